using System;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Chipset;

namespace Kvasir.Devices.Input;

/// <summary>
/// The 8042 keyboard and auxiliary device controller of a PC, ports 60h and 64h (IBM PS/2 Technical Reference,
/// "Keyboard/Auxiliary Device Controller"), with
/// a keyboard and a mouse.
/// </summary>
/// <remarks>The power-on command byte is what a BIOS leaves: keyboard interrupts and translation to scan code set 1.</remarks>
public sealed partial class I8042 : IPortDevice, IStateful<I8042.State>, IResettable
{
    public const ushort DataPort = 0x60;
    public const ushort CommandPort = 0x64;

    /// <summary>Where the byte in the output buffer came from.</summary>
    public enum Source : byte
    {
        None,
        Controller,
        Keyboard,
        Auxiliary,
    }

    /// <summary>All guest-visible state: the controller's, and its two devices' in their own.</summary>
    public record struct State
    {
        public Ram Memory;

        /// <summary>The command that waits for a byte at port 60h; 0 for none.</summary>
        public byte Pending;

        public bool LastWasCommand;
        public bool System;
        public byte Output;
        public Source OutputSource;

        /// <summary>Answers of the controller itself.</summary>
        public ByteQueue Answers;

        /// <summary>The next keyboard byte is a break code (F0h was translated away).</summary>
        public bool Breaking;

        /// <summary>Opaque: the keyboard's and the mouse's state.</summary>
        internal Ps2Keyboard.State Keyboard;

        internal Ps2Mouse.State Mouse;
    }

    /// <summary>The controller's 32 bytes of RAM; the command byte is the first.</summary>
    [System.Runtime.CompilerServices.InlineArray(32)]
    public struct Ram : IEquatable<Ram>
    {
        private byte _first;

        public readonly bool Equals(Ram other) => ((ReadOnlySpan<byte>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Ram other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[31]);

        public static bool operator ==(Ram a, Ram b) => a.Equals(b);

        public static bool operator !=(Ram a, Ram b) => !a.Equals(b);
    }

    // Wiring
    private readonly IIrqLine _keyboardIrq;
    private readonly IIrqLine _mouseIrq;
    private readonly A20Gate _a20;
    private readonly IPowerControl _power;
    private readonly VmTimer _repeat;
    private readonly Ps2Keyboard _keyboard;
    private readonly Ps2Mouse _mouse = new();

    // State
    private readonly Lock _lock = new();
    private State _state;

    /// <param name="keyboardIrq">ISA interrupt request 1.</param>
    /// <param name="mouseIrq">ISA interrupt request 12.</param>
    /// <param name="a20">Bit 1 of the output port.</param>
    /// <param name="power">Bit 0 of the output port, active low, resets the machine.</param>
    /// <param name="clock">For the keyboard's repeat.</param>
    public I8042(IIrqLine keyboardIrq, IIrqLine mouseIrq, A20Gate a20, IPowerControl power, VmClock clock)
    {
        _keyboardIrq = keyboardIrq;
        _mouseIrq = mouseIrq;
        _a20 = a20;
        _power = power;
        _keyboard = new Ps2Keyboard(clock);
        _repeat = clock.CreateTimer(OnRepeat);
        PowerOn();
    }

    /// <summary>The keyboard's lights: scroll, num and caps lock in bits 0 to 2.</summary>
    public byte Leds
    {
        get
        {
            lock (_lock)
                return _keyboard.Leds;
        }
    }

    private Mode CommandByte => (Mode)_state.Memory[0];

    /// <summary>Claims ports 60h and 64h.</summary>
    public void Map(PortBus bus)
    {
        bus.Map(DataPort, 1, this);
        bus.Map(CommandPort, 1, this);
    }

    /// <summary>A key goes down or up. Any thread.</summary>
    public void Key(PcKey key, bool pressed)
    {
        lock (_lock)
        {
            _keyboard.Key(key, pressed);
            ArmRepeat();
            Fill();
        }
    }

    /// <summary>The mouse moves. Any thread.</summary>
    /// <param name="x">Counts to the right.</param>
    /// <param name="y">Counts up, away from the user.</param>
    /// <param name="wheel">Clicks of the wheel towards the user.</param>
    public void MoveMouse(int x, int y, int wheel = 0)
    {
        lock (_lock)
        {
            _mouse.Move(x, y, wheel);
            Fill();
        }
    }

    /// <summary>The mouse's buttons: left, right, middle, fourth, fifth in bits 0 to 4. Any thread.</summary>
    public void SetMouseButtons(byte buttons)
    {
        lock (_lock)
        {
            _mouse.SetButtons(buttons);
            Fill();
        }
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            if (port == CommandPort)
                return (uint)ReadStatus();
            if (_state.OutputSource != Source.None)
            {
                _state.OutputSource = Source.None;
                DriveLines();
                uint value = _state.Output;
                Fill();
                return value;
            }
            return _state.Output;
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        bool reset;
        lock (_lock)
        {
            _state.LastWasCommand = port == CommandPort;
            reset = port == CommandPort ? WriteCommand((byte)value) : WriteData((byte)value);
            ArmRepeat();
            Fill();
        }
        if (reset)
            _power.Reset();
    }

    public void Reset()
    {
        lock (_lock)
        {
            PowerOn();
            _keyboard.PowerOn();
            _mouse.PowerOn();
            _repeat.Disarm();
            DriveLines();
        }
    }

    public State Save()
    {
        lock (_lock)
        {
            State state = _state;
            state.Keyboard = _keyboard.Live;
            state.Mouse = _mouse.Live;
            return state;
        }
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            _keyboard.Live = state.Keyboard;
            _mouse.Live = state.Mouse;
            _state.Keyboard = default;
            _state.Mouse = default;
            ArmRepeat();
            DriveLines();
        }
    }

    private void PowerOn()
    {
        _state = default;
        _state.Memory[0] = (byte)Mode.AtPowerOn;
        _state.System = true;
    }

    private Status ReadStatus()
    {
        Status status = Status.Unlocked;
        if (_state.OutputSource != Source.None)
            status |= Status.OutputFull;
        if (_state.OutputSource == Source.Auxiliary)
            status |= Status.AuxiliaryFull;
        if (_state.System)
            status |= Status.System;
        if (_state.LastWasCommand)
            status |= Status.Command;
        return status;
    }

    /// <returns>Whether the machine is to be reset.</returns>
    private bool WriteCommand(byte value)
    {
        _state.Pending = 0;
        switch ((Command)value)
        {
            case >= Command.ReadRam and < Command.ReadRam + 32:
                Answer(_state.Memory[value & 0x1f]);
                break;
            case >= Command.WriteRam and < Command.WriteRam + 32:
            case Command.WriteOutputPort:
            case Command.WriteKeyboardBuffer:
            case Command.WriteAuxiliaryBuffer:
            case Command.WriteAuxiliary:
                _state.Pending = value;
                break;
            case Command.TestPassword:
                // F1h: none is loaded.
                Answer(0xf1);
                break;
            case Command.DisableAuxiliary:
                SetMode(CommandByte | Mode.AuxiliaryDisabled);
                break;
            case Command.EnableAuxiliary:
                SetMode(CommandByte & ~Mode.AuxiliaryDisabled);
                break;
            case Command.TestAuxiliary:
            case Command.TestKeyboard:
                Answer(0);
                break;
            case Command.SelfTest:
                _state.System = true;
                Answer(0x55);
                break;
            case Command.DisableKeyboard:
                SetMode(CommandByte | Mode.KeyboardDisabled);
                break;
            case Command.EnableKeyboard:
                SetMode(CommandByte & ~Mode.KeyboardDisabled);
                break;
            case Command.ReadInputPort:
                // Bit 7: the keyboard is not locked.
                Answer(0x80);
                break;
            case Command.ReadOutputPort:
                Answer(ReadOutput());
                break;
            case Command.DisableA20:
                _a20.Set(false);
                break;
            case Command.EnableA20:
                _a20.Set(true);
                break;
            case Command.ReadTestInputs:
                Answer(0);
                break;
            case >= Command.PulseOutputPort:
                // Bits 3:0 low are pulsed low; bit 0 is the reset line.
                return (value & 1) == 0;
            default:
                break;
        }
        return false;
    }

    /// <returns>Whether the machine is to be reset.</returns>
    private bool WriteData(byte value)
    {
        byte pending = _state.Pending;
        _state.Pending = 0;
        switch ((Command)pending)
        {
            case >= Command.WriteRam and < Command.WriteRam + 32:
                if (pending == (byte)Command.WriteRam)
                    SetMode((Mode)value);
                else
                    _state.Memory[pending & 0x1f] = value;
                break;
            case Command.WriteOutputPort:
                _a20.Set((value & (byte)OutputPort.A20) != 0);
                return (value & (byte)OutputPort.NotReset) == 0;
            case Command.WriteKeyboardBuffer:
                PutOutput(value, Source.Keyboard);
                break;
            case Command.WriteAuxiliaryBuffer:
                PutOutput(value, Source.Auxiliary);
                break;
            case Command.WriteAuxiliary:
                // To send, the controller must let the device's clock go.
                SetMode(CommandByte & ~Mode.AuxiliaryDisabled);
                _mouse.Write(value);
                break;
            default:
                SetMode(CommandByte & ~Mode.KeyboardDisabled);
                _keyboard.Write(value);
                break;
        }
        return false;
    }

    private void SetMode(Mode mode)
    {
        _state.Memory[0] = (byte)mode;
        if ((mode & Mode.System) != 0)
            _state.System = true;
        DriveLines();
    }

    private byte ReadOutput()
    {
        int value = (int)OutputPort.NotReset | 0xc0;
        if (_a20.Enabled)
            value |= (int)OutputPort.A20;
        // Bits 4 and 5: output buffer full, from the keyboard or the auxiliary device.
        if (_state.OutputSource is Source.Keyboard or Source.Controller)
            value |= 0x10;
        else if (_state.OutputSource == Source.Auxiliary)
            value |= 0x20;
        return (byte)value;
    }

    private void Answer(byte value) => _state.Answers.TryPush(value);

    private void PutOutput(byte value, Source source)
    {
        _state.Output = value;
        _state.OutputSource = source;
        DriveLines();
    }

    /// <summary>
    /// Brings the next byte into an empty output buffer: the controller's own answers first, then the keyboard's, then the
    /// mouse's.
    /// </summary>
    private void Fill()
    {
        while (_state.OutputSource == Source.None)
        {
            if (_state.Answers.TryPop(out byte value))
            {
                PutOutput(value, Source.Controller);
            }
            else if ((CommandByte & Mode.KeyboardDisabled) == 0 && _keyboard.TryTake(out value))
            {
                if ((CommandByte & Mode.Translate) == 0)
                    PutOutput(value, Source.Keyboard);
                else if (value == 0xf0)
                    _state.Breaking = true;
                else
                    PutTranslated(value);
            }
            else if ((CommandByte & Mode.AuxiliaryDisabled) == 0 && _mouse.TryTake(out value))
            {
                PutOutput(value, Source.Auxiliary);
            }
            else
            {
                return;
            }
        }
    }

    private void PutTranslated(byte value)
    {
        byte code = ScanCodes.Translate(value);
        if (_state.Breaking)
            code |= 0x80;
        _state.Breaking = false;
        PutOutput(code, Source.Keyboard);
    }

    private void DriveLines()
    {
        bool keyboard = _state.OutputSource is Source.Keyboard or Source.Controller;
        _keyboardIrq.Set(keyboard && (CommandByte & Mode.KeyboardInterrupt) != 0);
        _mouseIrq.Set(_state.OutputSource == Source.Auxiliary && (CommandByte & Mode.AuxiliaryInterrupt) != 0);
    }

    private void ArmRepeat()
    {
        long at = _keyboard.RepeatAt;
        if (at == long.MaxValue)
            _repeat.Disarm();
        else
            _repeat.Arm(at);
    }

    private void OnRepeat()
    {
        lock (_lock)
        {
            _keyboard.Repeat();
            ArmRepeat();
            Fill();
        }
    }
}
