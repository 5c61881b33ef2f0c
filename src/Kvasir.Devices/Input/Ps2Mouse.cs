using System;

namespace Kvasir.Devices.Input;

/// <summary>
/// A PS/2 mouse (IBM PS/2 Technical Reference, "Mouse") that becomes an IntelliMouse (wheel) or an IntelliMouse Explorer (five
/// buttons) by the well-known
/// sequences of sample rates. It has no lock: its controller's covers it.
/// </summary>
internal sealed class Ps2Mouse
{
    private const byte Acknowledge = 0xfa;
    private const byte Resend = 0xfe;
    private const byte Standard = 0;
    private const byte Wheel = 3;
    private const byte Explorer = 4;

    private enum Command : byte
    {
        Scaling1 = 0xe6,
        Scaling2 = 0xe7,
        Resolution = 0xe8,
        Status = 0xe9,
        Stream = 0xea,
        ReadData = 0xeb,
        ResetWrap = 0xec,
        Wrap = 0xee,
        Remote = 0xf0,
        Identify = 0xf2,
        SampleRate = 0xf3,
        Enable = 0xf4,
        Disable = 0xf5,
        Defaults = 0xf6,
        Resend = 0xfe,
        Reset = 0xff,
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public ByteQueue Answers;
        public ByteQueue Packets;
        public byte Pending;
        public byte SampleRate;
        public byte Resolution;
        public bool Scaling2;
        public bool Remote;
        public bool Wrapped;
        public bool Reporting;

        /// <summary>0, 3 or 4: the device ID.</summary>
        public byte Kind;

        /// <summary>The last three sample rates, the newest lowest.</summary>
        public uint Rates;

        public byte Buttons;
        public byte ReportedButtons;
        public int X;
        public int Y;
        public int Z;
        public byte LastSent;
    }

    // State
    private State _state;

    public Ps2Mouse() => PowerOn();

    public ref State Live => ref _state;

    public void PowerOn()
    {
        byte buttons = _state.Buttons;
        _state = default;
        _state.Buttons = _state.ReportedButtons = buttons;
        SetDefaults();
    }

    public bool TryTake(out byte value)
    {
        if (!_state.Answers.TryPop(out value) && !_state.Packets.TryPop(out value))
            return false;
        _state.LastSent = value;
        // Movement that found the queue full goes out as soon as there is room.
        ReportIfDue();
        return true;
    }

    /// <summary>A byte from the controller.</summary>
    public void Write(byte value)
    {
        if (_state.Wrapped && (Command)value is not (Command.Reset or Command.ResetWrap))
        {
            Answer(value);
            return;
        }
        if (_state.Pending != 0)
        {
            Command pending = (Command)_state.Pending;
            _state.Pending = 0;
            WriteParameter(pending, value);
            return;
        }
        // A command interrupts a report that is being sent.
        _state.Packets.Clear();
        switch ((Command)value)
        {
            case Command.Reset:
                PowerOn();
                Answer(Acknowledge);
                Answer(0xaa);
                Answer(Standard);
                return;
            case Command.Resend:
                Answer(_state.LastSent);
                return;
            case Command.Scaling1:
                _state.Scaling2 = false;
                break;
            case Command.Scaling2:
                _state.Scaling2 = true;
                break;
            case Command.Resolution:
            case Command.SampleRate:
                _state.Pending = value;
                break;
            case Command.Stream:
                _state.Remote = false;
                break;
            case Command.Remote:
                _state.Remote = true;
                break;
            case Command.Wrap:
                _state.Wrapped = true;
                break;
            case Command.ResetWrap:
                _state.Wrapped = false;
                break;
            case Command.Enable:
                _state.Reporting = true;
                break;
            case Command.Disable:
                _state.Reporting = false;
                break;
            case Command.Defaults:
                SetDefaults();
                break;
            case Command.Status:
                Answer(Acknowledge);
                Answer(StatusByte());
                Answer(_state.Resolution);
                Answer(_state.SampleRate);
                return;
            case Command.Identify:
                Answer(Acknowledge);
                Answer(_state.Kind);
                return;
            case Command.ReadData:
                Answer(Acknowledge);
                PushPacket(ref _state.Answers);
                return;
            default:
                Answer(Resend);
                return;
        }
        Answer(Acknowledge);
    }

    /// <summary>Moves the mouse.</summary>
    /// <param name="x">Counts to the right.</param>
    /// <param name="y">Counts up, away from the user.</param>
    /// <param name="z">Clicks of the wheel towards the user.</param>
    public void Move(int x, int y, int z)
    {
        _state.X = Math.Clamp(_state.X + x, -1 << 16, 1 << 16);
        _state.Y = Math.Clamp(_state.Y + y, -1 << 16, 1 << 16);
        _state.Z = Math.Clamp(_state.Z + z, -1 << 10, 1 << 10);
        ReportIfDue();
    }

    /// <summary>Sets the buttons: left, right, middle, fourth, fifth in bits 0 to 4.</summary>
    public void SetButtons(byte buttons)
    {
        _state.Buttons = (byte)(buttons & 0x1f);
        ReportIfDue();
    }

    private void SetDefaults()
    {
        _state.SampleRate = 100;
        _state.Resolution = 2;
        _state.Scaling2 = false;
        _state.Reporting = false;
        _state.Remote = false;
        _state.X = _state.Y = _state.Z = 0;
    }

    private void WriteParameter(Command command, byte value)
    {
        if (command == Command.Resolution)
        {
            if (value > 3)
            {
                Answer(Resend);
                return;
            }
            _state.Resolution = value;
        }
        else
        {
            _state.SampleRate = value;
            _state.Rates = (_state.Rates << 8 | value) & 0xff_ffff;
            if (_state.Rates == (200 << 16 | 100 << 8 | 80))
                _state.Kind = Wheel;
            else if (_state.Rates == (200 << 16 | 200 << 8 | 80))
                _state.Kind = Explorer;
        }
        Answer(Acknowledge);
    }

    private byte StatusByte() => (byte)((_state.Remote ? 0x40 : 0) | (_state.Reporting ? 0x20 : 0) | (_state.Scaling2 ? 0x10 : 0)
        | (_state.Buttons & 1) << 2 | (_state.Buttons & 4) >> 1 | (_state.Buttons & 2) >> 1);

    private void Answer(byte value) => _state.Answers.TryPush(value);

    private void ReportIfDue()
    {
        if (!_state.Reporting || _state.Remote || _state.Wrapped || _state.Answers.Count > 0)
            return;
        while ((_state.X | _state.Y | _state.Z) != 0 || _state.Buttons != _state.ReportedButtons)
        {
            // A few packets at most lie in wait; further movement adds up instead.
            if (_state.Packets.Count > 12)
                return;
            if (_state.Kind == Standard)
            {
                _state.Z = 0;
                if ((_state.X | _state.Y) == 0 && ((_state.Buttons ^ _state.ReportedButtons) & 7) == 0)
                {
                    _state.ReportedButtons = _state.Buttons;
                    return;
                }
            }
            PushPacket(ref _state.Packets);
        }
    }

    private void PushPacket(ref ByteQueue queue)
    {
        if (queue.Room < 4)
            return;
        int x = Math.Clamp(_state.X, -256, 255);
        int y = Math.Clamp(_state.Y, -256, 255);
        _state.X -= x;
        _state.Y -= y;
        _state.ReportedButtons = _state.Buttons;
        queue.TryPush((byte)((y < 0 ? 0x20 : 0) | (x < 0 ? 0x10 : 0) | 8 | (_state.Buttons & 7)));
        queue.TryPush((byte)x);
        queue.TryPush((byte)y);
        if (_state.Kind == Standard)
            return;
        int z = _state.Kind == Wheel ? Math.Clamp(_state.Z, -128, 127) : Math.Clamp(_state.Z, -8, 7);
        _state.Z -= z;
        queue.TryPush(_state.Kind == Wheel ? (byte)z : (byte)((z & 0xf) | (_state.Buttons & 0x18) << 1));
    }
}
