using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The local APIC of one vCPU (Intel SDM vol. 3, ch. "Advanced Programmable Interrupt Controller"): xAPIC and x2APIC modes, local vector
/// table, timer, IPIs. The APIC ID cannot be changed (the SDM leaves that to the model); pins carry logical levels, so polarity
/// bits are kept but mean nothing.
/// </summary>
/// <remarks>
/// Any thread delivers interrupts; the vCPU's thread acknowledges them. One lock guards the state and is never held while a
/// message is sent, an
/// EOI broadcast or a vector fetched from the 8259s; <see cref="HasInterrupt"/> is read without it.
/// </remarks>
public sealed partial class LocalApic : ILocalApic, IMmioDevice, IStateful<LocalApic.State>, IResettable
{
    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public ulong Base;
        public byte TaskPriority;
        public uint LogicalDestination;
        public uint DestinationFormat;
        public uint Spurious;
        public uint ErrorStatus;
        public uint PendingErrors;
        public VectorSet InService;
        public VectorSet TriggerMode;
        public VectorSet Request;
        public ulong Command;
        public uint LvtCmci;
        public uint LvtTimer;
        public uint LvtThermal;
        public uint LvtPerformance;
        public uint LvtLint0;
        public uint LvtLint1;
        public uint LvtError;
        public uint InitialCount;
        public uint DivideConfiguration;

        /// <summary>When the timer expires next, in guest nanoseconds; <see cref="long.MaxValue"/> while it stands.</summary>
        public long Expiry;

        public ulong TscDeadline;

        /// <summary>The vCPU's TSC minus <see cref="VmClock.TscNow"/>.</summary>
        public long TscOffset;

        public bool Lint0;
        public bool Lint1;

        /// <summary>An ExtINT message came over the bus and was not acknowledged yet.</summary>
        public bool ExternalPending;
    }

    // Configuration
    private readonly LocalApicFeatures _features;
    private readonly bool _bootProcessor;

    // Wiring
    private readonly ApicBus _bus;
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private IVcpuSignals? _signals;

    // State
    private readonly Lock _lock = new();
    private State _state;
    private volatile bool _ready;
    private volatile byte _priority;

    /// <summary>Makes the APIC and attaches it to the bus.</summary>
    /// <param name="id">The APIC ID; each on a bus has its own, and 255 and FFFFFFFFh are taken for broadcasts.</param>
    /// <param name="bootProcessor">Sets the BSP bit of IA32_APIC_BASE.</param>
    public LocalApic(uint id, bool bootProcessor, ApicBus bus, VmClock clock, LocalApicFeatures? features = null)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(id, 0x7fffu);
        Id = id;
        _bootProcessor = bootProcessor;
        _bus = bus;
        _clock = clock;
        _features = features ?? new LocalApicFeatures();
        _timer = clock.CreateTimer(OnTimer);
        _state = PowerOn();
        bus.Attach(this);
    }

    /// <summary>The APIC ID.</summary>
    public uint Id { get; }

    /// <summary>Connects the vCPU's pins. Interrupts that came before wait for it.</summary>
    public void Connect(IVcpuSignals signals)
    {
        lock (_lock)
        {
            _signals = signals;
            if (_ready)
                signals.InterruptChanged();
        }
    }

    public bool HasInterrupt => _ready;

    /// <summary>IA32_APIC_BASE. Lock-free: it is asked for with each access to its page.</summary>
    public ulong Base => Volatile.Read(ref _state.Base);

    public IMmioDevice Registers => this;

    public byte TaskPriorityClass
    {
        get
        {
            lock (_lock)
                return (byte)(_state.TaskPriority >> 4);
        }

        set
        {
            lock (_lock)
            {
                // MOV to CR8 clears the sub-class.
                _state.TaskPriority = (byte)(value << 4);
                Evaluate();
            }
        }
    }

    /// <summary>
    /// How far the vCPU's TSC is ahead of <see cref="VmClock.TscNow"/>, in ticks. The vCPU sets it when the guest writes
    /// IA32_TIME_STAMP_COUNTER or
    /// IA32_TSC_ADJUST: a TSC deadline moves with it.
    /// </summary>
    public long TscOffset
    {
        get
        {
            lock (_lock)
                return _state.TscOffset;
        }

        set
        {
            lock (_lock)
            {
                _state.TscOffset = value;
                if (Mode == TimerMode.TscDeadline)
                    StartDeadline();
            }
        }
    }

    /// <summary>The processor priority (PPR), for arbitration. Lock-free.</summary>
    internal byte ProcessorPriority => _priority;

    /// <summary>Whether fixed interrupts are taken. Lock-free, so a moment later it may differ.</summary>
    internal bool AcceptsFixed => HardwareEnabled && SoftwareEnabled;

    private bool HardwareEnabled => (_state.Base & (ulong)ApicBase.Enable) != 0;

    private bool SoftwareEnabled => (_state.Spurious & (uint)Svr.Enable) != 0;

    private bool InX2ApicMode => (_state.Base & (ulong)ApicBase.X2Apic) != 0;

    private bool ExternalWaits =>
        HardwareEnabled
            ? _state.ExternalPending
                || (_state.Lint0 && (_state.LvtLint0 & (uint)Lvt.Masked) == 0 && ModeOf(_state.LvtLint0) == DeliveryMode.ExtInt)
            : _state.Lint0;

    /// <summary>
    /// Sets what a BIOS leaves behind: enabled, LINT0 for the 8259s (virtual wire mode, MultiProcessor Specification 1.4,
    /// 3.6.2.2), LINT1 for NMI.
    /// For boots without firmware.
    /// </summary>
    public void ConfigureVirtualWire()
    {
        lock (_lock)
        {
            _state.Spurious = DefaultSpurious | (uint)Svr.Enable;
            _state.LvtLint0 = (uint)DeliveryMode.ExtInt << 8;
            _state.LvtLint1 = (uint)DeliveryMode.Nmi << 8;
            Evaluate();
        }
        _bus.RetryLevels();
    }

    public int Acknowledge()
    {
        lock (_lock)
        {
            if (!ExternalWaits)
                return AcknowledgeOwn();
            _state.ExternalPending = false;
        }
        // Not under the lock: the 8259s lower LINT0 while they answer.
        int vector = _bus.AcknowledgeExternal();
        lock (_lock)
            Evaluate();
        return vector;
    }

    /// <summary>A source inside the processor asks for an interrupt through its local vector.</summary>
    public void Trigger(LocalVector source)
    {
        lock (_lock)
        {
            DeliverLocal(source);
            if (source == LocalVector.Performance)
                _state.LvtPerformance |= (uint)Lvt.Masked;
            Evaluate();
        }
    }

    public void Init()
    {
        lock (_lock)
        {
            ResetRegisters();
            Evaluate();
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            bool lint0 = _state.Lint0;
            bool lint1 = _state.Lint1;
            // The TSC is the vCPU's: it sets the offset when its own reset changes it.
            long tscOffset = _state.TscOffset;
            _timer.Disarm();
            _state = PowerOn();
            _state.Lint0 = lint0;
            _state.Lint1 = lint1;
            _state.TscOffset = tscOffset;
            Evaluate();
        }
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            ArmTimer();
            Evaluate();
        }
    }

    /// <summary>Whether a message with a destination field addresses this APIC. Lock-free.</summary>
    internal bool Matches(in ApicMessage message)
    {
        if (message.IsBroadcast)
            return true;
        uint destination = message.Destination;
        if (!message.Logical)
            return destination == Id;
        if (InX2ApicMode)
        {
            uint logical = X2LogicalDestination(Id);
            return destination >> 16 == logical >> 16 && (destination & logical & 0xffff) != 0;
        }
        if (destination > 0xff)
            return false;
        uint own = _state.LogicalDestination >> 24;
        // DFR bits 31:28: 1111 is the flat model, 0000 the cluster model.
        if (_state.DestinationFormat >> 28 == 0xf)
            return (destination & own) != 0;
        return (destination >> 4 == own >> 4 || destination >> 4 == 0xf) && (destination & own & 0xf) != 0;
    }

    /// <summary>Takes a message. Any thread, holding no local APIC's lock.</summary>
    /// <returns>False where the APIC is off or knows no such message.</returns>
    internal bool Accept(DeliveryMode mode, byte vector, bool level)
    {
        lock (_lock)
        {
            if (!HardwareEnabled)
                return false;
            switch (mode)
            {
                case DeliveryMode.Fixed:
                case DeliveryMode.LowestPriority:
                    if (!SoftwareEnabled)
                        return false;
                    if (vector < 16)
                        RecordError(Errors.ReceiveIllegalVector);
                    else
                        Request(vector, level);
                    Evaluate();
                    return true;
                case DeliveryMode.Smi:
                    _signals?.Smi();
                    return true;
                case DeliveryMode.Nmi:
                    _signals?.Nmi();
                    return true;
                case DeliveryMode.Init:
                    _signals?.Init();
                    return true;
                case DeliveryMode.StartUp:
                    _signals?.Sipi(vector);
                    return true;
                case DeliveryMode.ExtInt:
                    _state.ExternalPending = true;
                    Evaluate();
                    return true;
                default:
                    return false;
            }
        }
    }

    internal void SetLint0(bool asserted)
    {
        lock (_lock)
        {
            bool rise = asserted && !_state.Lint0;
            _state.Lint0 = asserted;
            // With the APIC off the pin is the processor's INTR, which Evaluate passes on.
            if (HardwareEnabled)
                PinChanged(LocalVector.Lint0, rise, asserted);
            Evaluate();
        }
    }

    internal void SetLint1(bool asserted)
    {
        lock (_lock)
        {
            bool rise = asserted && !_state.Lint1;
            _state.Lint1 = asserted;
            if (HardwareEnabled)
                PinChanged(LocalVector.Lint1, rise, asserted);
            else if (rise)
                _signals?.Nmi();
            Evaluate();
        }
    }

    private static uint X2LogicalDestination(uint id) => (id >> 4) << 16 | 1u << (int)(id & 0xf);

    private static DeliveryMode ModeOf(uint lvt) => (DeliveryMode)(lvt >> 8 & 7);

    private State PowerOn()
    {
        State state = default;
        state.Base = DefaultAddress | (ulong)ApicBase.Enable | (_bootProcessor ? (ulong)ApicBase.BootProcessor : 0);
        SetInitialRegisters(ref state);
        return state;
    }

    private static void SetInitialRegisters(ref State state)
    {
        state.DestinationFormat = 0xffff_ffff;
        state.Spurious = DefaultSpurious;
        state.LvtCmci = state.LvtTimer = state.LvtThermal = state.LvtPerformance = (uint)Lvt.Masked;
        state.LvtLint0 = state.LvtLint1 = state.LvtError = (uint)Lvt.Masked;
        state.Expiry = long.MaxValue;
    }

    /// <summary>The effect of INIT, and of switching the APIC off: everything but ID, base, pins and TSC as after power-on.</summary>
    private void ResetRegisters()
    {
        State fresh = default;
        SetInitialRegisters(ref fresh);
        fresh.Base = _state.Base;
        fresh.TscOffset = _state.TscOffset;
        fresh.Lint0 = _state.Lint0;
        fresh.Lint1 = _state.Lint1;
        _state = fresh;
        _timer.Disarm();
    }

    private int AcknowledgeOwn()
    {
        if (!HardwareEnabled)
            return -1;
        int vector = _state.Request.Highest;
        if (vector < 0 || vector >> 4 <= _priority >> 4)
        {
            Evaluate();
            return -1;
        }
        _state.Request.Remove(vector);
        _state.InService.Add(vector);
        Evaluate();
        return vector;
    }

    private void Request(int vector, bool level)
    {
        _state.Request.Add(vector);
        if (level)
            _state.TriggerMode.Add(vector);
        else
            _state.TriggerMode.Remove(vector);
    }

    /// <summary>Derives PPR and whether an interrupt waits, and tells the vCPU when one begins to.</summary>
    private void Evaluate()
    {
        int service = Math.Max(_state.InService.Highest, 0);
        _priority = (byte)(_state.TaskPriority >> 4 >= service >> 4 ? _state.TaskPriority : service & 0xf0);
        bool ready = (HardwareEnabled && _state.Request.Highest >> 4 > _priority >> 4) || ExternalWaits;
        bool begins = ready && !_ready;
        _ready = ready;
        if (begins)
            _signals?.InterruptChanged();
    }

    /// <summary>Ends the interrupt in service.</summary>
    /// <returns>The vector to broadcast, or -1.</returns>
    private int EndOfInterrupt()
    {
        int vector = _state.InService.Highest;
        if (vector < 0)
            return -1;
        _state.InService.Remove(vector);
        bool level = _state.TriggerMode.Contains(vector);
        EndLevelPin(ref _state.LvtLint0, vector, _state.Lint0);
        EndLevelPin(ref _state.LvtLint1, vector, _state.Lint1);
        Evaluate();
        return level && (_state.Spurious & (uint)Svr.SuppressEoiBroadcast) == 0 ? vector : -1;
    }

    private void EndLevelPin(ref uint lvt, int vector, bool asserted)
    {
        if ((lvt & (uint)Lvt.RemoteIrr) == 0 || (byte)lvt != vector)
            return;
        lvt &= ~(uint)Lvt.RemoteIrr;
        RequestLevelPin(ref lvt, asserted);
    }

    private void RequestLevelPin(ref uint lvt, bool asserted)
    {
        if (!asserted || (lvt & (uint)(Lvt.Masked | Lvt.RemoteIrr)) != 0 || ModeOf(lvt) != DeliveryMode.Fixed || (byte)lvt < 16)
            return;
        lvt |= (uint)Lvt.RemoteIrr;
        Request((byte)lvt, level: true);
    }

    private void PinChanged(LocalVector pin, bool rise, bool asserted)
    {
        ref uint lvt = ref LvtOf(pin);
        if ((lvt & (uint)Lvt.LevelTriggered) != 0 && ModeOf(lvt) == DeliveryMode.Fixed)
            RequestLevelPin(ref lvt, asserted);
        else if (rise && ModeOf(lvt) != DeliveryMode.ExtInt)
            DeliverLocal(pin);
    }

    /// <summary>Acts on one entry of the local vector table.</summary>
    private void DeliverLocal(LocalVector source)
    {
        uint lvt = LvtOf(source);
        if ((lvt & (uint)Lvt.Masked) != 0 || !HardwareEnabled)
            return;
        DeliveryMode mode = source is LocalVector.Timer or LocalVector.Error ? DeliveryMode.Fixed : ModeOf(lvt);
        switch (mode)
        {
            case DeliveryMode.Fixed:
                if ((byte)lvt >= 16)
                    Request((byte)lvt, level: false);
                else if (source == LocalVector.Error)
                    _state.PendingErrors |= (uint)Errors.ReceiveIllegalVector;
                else
                    RecordError(Errors.ReceiveIllegalVector);
                break;
            case DeliveryMode.Smi:
                _signals?.Smi();
                break;
            case DeliveryMode.Nmi:
                _signals?.Nmi();
                break;
            case DeliveryMode.Init:
                _signals?.Init();
                break;
            case DeliveryMode.ExtInt:
                _state.ExternalPending = true;
                break;
            default:
                break;
        }
    }

    private void RecordError(Errors error)
    {
        bool known = (_state.PendingErrors & (uint)error) != 0;
        _state.PendingErrors |= (uint)error;
        if (!known)
            DeliverLocal(LocalVector.Error);
    }

    private ref uint LvtOf(LocalVector source)
    {
        switch (source)
        {
            case LocalVector.Cmci: return ref _state.LvtCmci;
            case LocalVector.Timer: return ref _state.LvtTimer;
            case LocalVector.Thermal: return ref _state.LvtThermal;
            case LocalVector.Performance: return ref _state.LvtPerformance;
            case LocalVector.Lint0: return ref _state.LvtLint0;
            case LocalVector.Lint1: return ref _state.LvtLint1;
            default: return ref _state.LvtError;
        }
    }
}
