using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>Where the power management registers are and what their values mean; the firmware tables must say the same.</summary>
/// <param name="Base">PM1a event block; control is at +4, the timer at +8.</param>
/// <param name="Gpe">The GPE0 block: as many bytes of status as of enables.</param>
/// <param name="GpeSize">Bytes of the GPE0 block, 16 at most.</param>
/// <param name="SmiCommand">The SMI command port; its data port follows.</param>
/// <param name="AcpiEnable">Written to the command port to set SCI_EN.</param>
/// <param name="AcpiDisable">Written to the command port to clear it.</param>
/// <param name="SleepTypeS3">SLP_TYP of suspend to memory.</param>
/// <param name="SleepTypeS5">SLP_TYP of power off.</param>
/// <param name="WideTimer">The timer counts 32 bits, not 24.</param>
/// <param name="CanSuspend">S3 is offered; otherwise asking for it does nothing.</param>
public sealed record AcpiPmLayout(
    ushort Base = 0x600,
    ushort Gpe = 0x620,
    byte GpeSize = 16,
    ushort SmiCommand = 0xb2,
    byte AcpiEnable = 2,
    byte AcpiDisable = 3,
    byte SleepTypeS3 = 1,
    byte SleepTypeS5 = 0,
    bool WideTimer = false,
    bool CanSuspend = false);

/// <summary>
/// ACPI fixed hardware (ACPI specification 6.5, 4.8): PM1a event and control blocks, the power management timer, the GPE0 block,
/// and the SMI
/// command port of legacy chipsets, which here switches SCI_EN without a trip to system management mode. SMI_EN (ICH9 datasheet 316972, 13.8.3.11) says that management mode
/// has been set up already, so that firmware leaves it alone.
/// </summary>
public sealed class AcpiPm : IPortDevice, IStateful<AcpiPm.State>, IResettable
{
    /// <summary>Ports from <see cref="AcpiPmLayout.Base"/>: events, control, timer.</summary>
    public const int BlockSize = 12;

    /// <summary>The timer's rate in Hz.</summary>
    public const ulong TimerFrequency = 3_579_545;

    /// <summary>SMI_EN, from <see cref="AcpiPmLayout.Base"/>, where the block reaches so far: read only.</summary>
    private const ushort SmiEnable = 0x30;
    private const uint SmiOnCommand = 1 << 5;

    private enum Register
    {
        StatusLow = 0,
        StatusHigh = 1,
        EnableLow = 2,
        EnableHigh = 3,
        ControlLow = 4,
        ControlHigh = 5,
        Timer = 8,
    }

    /// <summary>PM1 status and enable bits.</summary>
    [Flags]
    private enum Events : ushort
    {
        None = 0,
        Timer = 1 << 0,
        Global = 1 << 5,
        PowerButton = 1 << 8,
        SleepButton = 1 << 9,
        Rtc = 1 << 10,
        Enables = Timer | Global | PowerButton | SleepButton | Rtc,
        Wake = 1 << 15,
    }

    [Flags]
    private enum Control : ushort
    {
        None = 0,
        SciEnable = 1 << 0,
        BusMasterReload = 1 << 1,
        GlobalRelease = 1 << 2,
        SleepType = 7 << 10,
        SleepEnable = 1 << 13,

        /// <summary>GBL_RLS and SLP_EN read as zero.</summary>
        Kept = SciEnable | BusMasterReload | SleepType,
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public ushort Status;
        public ushort Enable;
        public ushort Control;
        public ulong GpeStatus;
        public ulong GpeEnable;
        public byte SmiCommand;
        public byte SmiData;

        /// <summary>Half-periods of the timer that have been accounted for in TMR_STS.</summary>
        public ulong HalfPeriods;
    }

    // Configuration
    private readonly AcpiPmLayout _layout;
    private readonly int _timerBits;

    // Wiring
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private readonly IIrqLine _sci;
    private readonly IPowerControl _power;

    // State
    private readonly Lock _lock = new();
    private State _state;

    /// <param name="sci">The system control interrupt, level-triggered.</param>
    /// <param name="power">Carries out sleep states.</param>
    public AcpiPm(VmClock clock, IIrqLine sci, IPowerControl power, AcpiPmLayout? layout = null)
    {
        _layout = layout ?? new AcpiPmLayout();
        ArgumentOutOfRangeException.ThrowIfGreaterThan(_layout.GpeSize, (byte)16, nameof(layout));
        _timerBits = _layout.WideTimer ? 32 : 24;
        _clock = clock;
        _sci = sci;
        _power = power;
        _timer = clock.CreateTimer(OnTimer);
        _state.HalfPeriods = HalfPeriods();
    }

    /// <summary>Claims the PM1 and timer ports, the GPE0 block and the SMI command ports.</summary>
    public void Map(PortBus bus)
    {
        bus.Map(_layout.Base, BlockSize, this, AccessSize.Dword);
        if (_layout.GpeSize > 0)
            bus.Map(_layout.Gpe, _layout.GpeSize, this);
        bus.Map(_layout.SmiCommand, 2, this);
        bus.Map((ushort)(_layout.Base + SmiEnable), sizeof(uint), this, AccessSize.Dword);
    }

    /// <summary>Somebody presses the power button.</summary>
    /// <returns>Whether the guest asked to hear of it; an operating system without ACPI does not.</returns>
    public bool PressPowerButton()
    {
        lock (_lock)
        {
            _state.Status |= (ushort)Events.PowerButton;
            UpdateSci();
            return (_state.Control & (ushort)Control.SciEnable) != 0 && (_state.Enable & (ushort)Events.PowerButton) != 0;
        }
    }

    /// <summary>Somebody presses the sleep button.</summary>
    public void PressSleepButton()
    {
        lock (_lock)
        {
            _state.Status |= (ushort)Events.SleepButton;
            UpdateSci();
        }
    }

    /// <summary>A general purpose event, 0 to 63: hot-plug and its like.</summary>
    public void RaiseGpe(int number)
    {
        lock (_lock)
        {
            if (number < _layout.GpeSize * 4)
                _state.GpeStatus |= 1ul << number;
            UpdateSci();
        }
    }

    /// <summary>The machine woke from a sleep state: WAK_STS, and the button that woke it.</summary>
    public void Wake()
    {
        lock (_lock)
        {
            _state.Status |= (ushort)(Events.Wake | Events.PowerButton);
            UpdateSci();
        }
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            if (port == _layout.SmiCommand)
                return _state.SmiCommand;
            if (port == _layout.SmiCommand + 1)
                return _state.SmiData;
            if (IsSmiEnable(port))
                return SmiOnCommand >> (port - _layout.Base - SmiEnable) * 8;
            if (InGpe(port, out bool enables, out int shift))
                return (byte)((enables ? _state.GpeEnable : _state.GpeStatus) >> shift);
            CountTimer();
            uint timer = Timer();
            uint value = 0;
            for (int i = 0; i < (int)size; i++)
                value |= (uint)ReadByte(port - _layout.Base + i, timer) << i * 8;
            return value;
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        Control sleep = Control.None;
        lock (_lock)
        {
            if (port == _layout.SmiCommand)
            {
                WriteSmiCommand((byte)value);
            }
            else if (port == _layout.SmiCommand + 1)
            {
                _state.SmiData = (byte)value;
            }
            else if (IsSmiEnable(port))
            {
                return;
            }
            else if (InGpe(port, out bool enables, out int shift))
            {
                if (enables)
                    _state.GpeEnable = (_state.GpeEnable & ~(0xfful << shift)) | (ulong)(byte)value << shift;
                else
                    _state.GpeStatus &= ~((ulong)(byte)value << shift);
            }
            else
            {
                CountTimer();
                for (int i = 0; i < (int)size; i++)
                    sleep |= WriteByte(port - _layout.Base + i, (byte)(value >> i * 8));
            }
            UpdateSci();
        }
        // Outside the lock: the machine answers by stopping everything.
        if ((sleep & Control.SleepEnable) != 0)
            Sleep((byte)((int)(sleep & Control.SleepType) >> 10));
    }

    public void Reset()
    {
        lock (_lock)
        {
            _state = default;
            _state.HalfPeriods = HalfPeriods();
            UpdateSci();
        }
    }

    public State Save()
    {
        lock (_lock)
        {
            CountTimer();
            return _state;
        }
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            UpdateSci();
        }
    }

    private bool InGpe(ushort port, out bool enables, out int shift)
    {
        int offset = port - _layout.Gpe;
        int half = _layout.GpeSize / 2;
        enables = offset >= half;
        shift = (enables ? offset - half : offset) * 8;
        return offset >= 0 && offset < _layout.GpeSize;
    }

    private bool IsSmiEnable(ushort port) => port - _layout.Base is >= SmiEnable and < SmiEnable + sizeof(uint);

    private byte ReadByte(int offset, uint timer) => (Register)offset switch
    {
        Register.StatusLow => (byte)_state.Status,
        Register.StatusHigh => (byte)(_state.Status >> 8),
        Register.EnableLow => (byte)_state.Enable,
        Register.EnableHigh => (byte)(_state.Enable >> 8),
        Register.ControlLow => (byte)_state.Control,
        Register.ControlHigh => (byte)(_state.Control >> 8),
        >= Register.Timer and <= Register.Timer + 3 => (byte)(timer >> (offset - (int)Register.Timer) * 8),
        _ => 0,
    };

    /// <returns>SLP_EN and SLP_TYP where they were written.</returns>
    private Control WriteByte(int offset, byte value)
    {
        switch ((Register)offset)
        {
            case Register.StatusLow:
                _state.Status &= (ushort)~value;
                break;
            case Register.StatusHigh:
                _state.Status &= (ushort)~(value << 8);
                break;
            case Register.EnableLow:
                _state.Enable = (ushort)(((_state.Enable & 0xff00) | value) & (int)Events.Enables);
                break;
            case Register.EnableHigh:
                _state.Enable = (ushort)(((_state.Enable & 0xff) | value << 8) & (int)Events.Enables);
                break;
            case Register.ControlLow:
                _state.Control = (ushort)((_state.Control & 0xff00) | (value & (int)Control.Kept));
                break;
            case Register.ControlHigh:
                _state.Control = (ushort)((_state.Control & 0xff) | (value << 8 & (int)Control.Kept));
                return (Control)(value << 8) & (Control.SleepEnable | Control.SleepType);
            default:
                break;
        }
        return Control.None;
    }

    private void WriteSmiCommand(byte value)
    {
        _state.SmiCommand = value;
        if (value == _layout.AcpiEnable)
            _state.Control |= (ushort)Control.SciEnable;
        else if (value == _layout.AcpiDisable)
            _state.Control &= (ushort)~Control.SciEnable;
    }

    private void Sleep(byte type)
    {
        if (type == _layout.SleepTypeS5)
            _power.PowerOff();
        else if (type == _layout.SleepTypeS3 && _layout.CanSuspend)
            _power.Suspend();
    }

    private uint Timer() => (uint)(VmClock.ToTicks(_clock.Now, TimerFrequency) & ((1ul << _timerBits) - 1));

    private ulong HalfPeriods() => VmClock.ToTicks(_clock.Now, TimerFrequency) >> (_timerBits - 1);

    /// <summary>TMR_STS is set each time the timer's highest bit changes.</summary>
    private void CountTimer()
    {
        ulong now = HalfPeriods();
        if (now == _state.HalfPeriods)
            return;
        _state.HalfPeriods = now;
        _state.Status |= (ushort)Events.Timer;
    }

    private void OnTimer()
    {
        lock (_lock)
        {
            CountTimer();
            UpdateSci();
        }
    }

    private void UpdateSci()
    {
        bool enabled = (_state.Control & (ushort)Control.SciEnable) != 0;
        bool pending = (_state.Status & _state.Enable) != 0 || (_state.GpeStatus & _state.GpeEnable) != 0;
        _sci.Set(enabled && pending);
        if ((_state.Enable & (ushort)Events.Timer) != 0 && (_state.Status & (ushort)Events.Timer) == 0)
            _timer.Arm(VmClock.ToNanoseconds((_state.HalfPeriods + 1) << (_timerBits - 1), TimerFrequency));
        else
            _timer.Disarm();
    }
}
