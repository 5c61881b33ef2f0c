using Kvasir.Core;

namespace Kvasir.Devices.Input;

/// <summary>
/// A PS/2 keyboard of 102 keys (IBM PS/2 Technical Reference, "Keyboards (101- and 102-key)"): scan code sets 1 and 2, typematic
/// repeat. It has no
/// lock: its controller's covers it.
/// </summary>
internal sealed class Ps2Keyboard
{
    private const byte Acknowledge = 0xfa;
    private const byte Resend = 0xfe;
    private const byte SelfTestPassed = 0xaa;
    private const byte Released = 0xf0;

    /// <summary>Rate 10.9 a second after half a second.</summary>
    private const byte DefaultTypematic = 0x2b;

    private enum Command : byte
    {
        SetLeds = 0xed,
        Echo = 0xee,
        ScanCodeSet = 0xf0,
        Identify = 0xf2,
        Typematic = 0xf3,
        Enable = 0xf4,
        DisableAndDefaults = 0xf5,
        Defaults = 0xf6,
        AllTypematic = 0xf7,
        KeyMakeBreak = 0xfd,
        Resend = 0xfe,
        Reset = 0xff,
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        /// <summary>Answers to commands: they go before scan codes.</summary>
        public ByteQueue Answers;
        public ByteQueue Keys;

        /// <summary>The command that waits for its parameter.</summary>
        public byte Pending;

        public byte Leds;
        public byte Typematic;

        /// <summary>1 or 2.</summary>
        public byte CodeSet;

        public bool Scanning;
        public byte LastSent;

        /// <summary>The key that repeats, or <see cref="PcKey.None"/>.</summary>
        public PcKey Repeating;

        /// <summary>When it repeats next, in guest nanoseconds.</summary>
        public long RepeatAt;
    }

    // Wiring
    private readonly VmClock _clock;

    // State
    private State _state;

    public Ps2Keyboard(VmClock clock)
    {
        _clock = clock;
        PowerOn();
    }

    public ref State Live => ref _state;

    /// <summary>Scroll, num and caps lock in bits 0 to 2.</summary>
    public byte Leds => _state.Leds;

    /// <summary>When a held key repeats next, or <see cref="long.MaxValue"/>.</summary>
    public long RepeatAt => _state.Repeating == PcKey.None ? long.MaxValue : _state.RepeatAt;

    public void PowerOn()
    {
        _state = default;
        SetDefaults();
        _state.Scanning = true;
    }

    public bool TryTake(out byte value)
    {
        if (!_state.Answers.TryPop(out value) && !_state.Keys.TryPop(out value))
            return false;
        _state.LastSent = value;
        return true;
    }

    /// <summary>A byte from the controller.</summary>
    public void Write(byte value)
    {
        if (_state.Pending != 0)
        {
            Command pending = (Command)_state.Pending;
            _state.Pending = 0;
            // A parameter is below 80h; a command in its place takes over.
            if (value < 0x80)
            {
                WriteParameter(pending, value);
                return;
            }
        }
        switch ((Command)value)
        {
            case Command.SetLeds:
            case Command.ScanCodeSet:
            case Command.Typematic:
                _state.Pending = value;
                Answer(Acknowledge);
                break;
            case Command.Echo:
                Answer(value);
                break;
            case Command.Identify:
                Answer(Acknowledge);
                Answer(0xab);
                Answer(0x83);
                break;
            case Command.Enable:
                _state.Keys.Clear();
                _state.Scanning = true;
                Answer(Acknowledge);
                break;
            case Command.DisableAndDefaults:
                SetDefaults();
                _state.Scanning = false;
                Answer(Acknowledge);
                break;
            case Command.Defaults:
                SetDefaults();
                Answer(Acknowledge);
                break;
            case >= Command.AllTypematic and <= Command.KeyMakeBreak:
                // Key types exist in set 3 alone.
                Answer(Acknowledge);
                break;
            case Command.Resend:
                Answer(_state.LastSent);
                break;
            case Command.Reset:
                PowerOn();
                Answer(Acknowledge);
                Answer(SelfTestPassed);
                break;
            default:
                Answer(Resend);
                break;
        }
    }

    /// <summary>A key goes down or up.</summary>
    public void Key(PcKey key, bool pressed)
    {
        if (!_state.Scanning || key == PcKey.None)
            return;
        if (pressed)
        {
            long delay = ((_state.Typematic >> 5 & 3) + 1) * 250_000_000L;
            _state.Repeating = key is PcKey.Pause ? PcKey.None : key;
            _state.RepeatAt = _clock.Now + delay;
        }
        else if (_state.Repeating == key)
        {
            _state.Repeating = PcKey.None;
        }
        Send(key, pressed);
    }

    /// <summary>Repeats the held key if it is time.</summary>
    public void Repeat()
    {
        long now = _clock.Now;
        if (RepeatAt > now)
            return;
        Send(_state.Repeating, pressed: true);
        // Period: (8 + low three bits) x 2^(next two) x 4.17 ms.
        long period = (8 + (_state.Typematic & 7)) * (1L << (_state.Typematic >> 3 & 3)) * 4_170_000;
        _state.RepeatAt = now + period;
    }

    private void SetDefaults()
    {
        _state.Keys.Clear();
        _state.Typematic = DefaultTypematic;
        _state.CodeSet = 2;
        _state.Repeating = PcKey.None;
        _state.Pending = 0;
    }

    private void WriteParameter(Command command, byte value)
    {
        switch (command)
        {
            case Command.SetLeds:
                _state.Leds = (byte)(value & 7);
                Answer(Acknowledge);
                break;
            case Command.Typematic:
                _state.Typematic = value;
                Answer(Acknowledge);
                break;
            case Command.ScanCodeSet when value == 0:
                Answer(Acknowledge);
                Answer(_state.CodeSet);
                break;
            case Command.ScanCodeSet when value is 1 or 2:
                _state.CodeSet = value;
                _state.Keys.Clear();
                Answer(Acknowledge);
                break;
            default:
                // Set 3 is left out, as on many keyboards.
                Answer(Resend);
                break;
        }
    }

    private void Answer(byte value) => _state.Answers.TryPush(value);

    private void Send(PcKey key, bool pressed)
    {
        // A key is sent whole or, when the queue is full, not at all: at most 10 bytes.
        if (_state.Keys.Room < 12)
            return;
        byte code = (byte)key;
        switch (key)
        {
            case PcKey.Pause:
                if (!pressed)
                    return;
                Push(0xe1);
                Code(0x1d, pressed: true);
                Code(0x45, pressed: true);
                Push(0xe1);
                Code(0x1d, pressed: false);
                Code(0x45, pressed: false);
                break;
            case PcKey.PrintScreen:
                Push(0xe0);
                Code(pressed ? (byte)0x2a : (byte)0x37, pressed);
                Push(0xe0);
                Code(pressed ? (byte)0x37 : (byte)0x2a, pressed);
                break;
            default:
                if ((int)key >> 8 == 0xe0)
                    Push(0xe0);
                Code(code, pressed);
                break;
        }
    }

    private void Code(byte set1, bool pressed)
    {
        if (_state.CodeSet == 1)
        {
            Push((byte)(pressed ? set1 : set1 | 0x80));
            return;
        }
        if (!pressed)
            Push(Released);
        Push(ScanCodes.ToSet2(set1));
    }

    private void Push(byte value) => _state.Keys.TryPush(value);
}
