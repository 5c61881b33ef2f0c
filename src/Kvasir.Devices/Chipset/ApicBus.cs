using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>Who answers an interrupt acknowledge cycle with a vector: the pair of 8259As.</summary>
public interface IInterruptAcknowledge
{
    /// <summary>The INTA cycle. Any vCPU's thread.</summary>
    int Acknowledge();
}

/// <summary>
/// What connects all local APICs and I/O APICs of a VM: routes interrupt messages (IPIs, I/O APIC pins, MSIs) to their targets
/// (Intel SDM vol. 3,
/// "Determining IPI Destination" and "Message Signalled Interrupts"), the 8259s' INT to every LINT0, and EOIs back.
/// </summary>
/// <remarks>
/// Lock order: device, then 8259 or I/O APIC, then local APIC, then vCPU. The bus has no lock of its own, and a local APIC sends only
/// after it has let go of its own lock, so that two of them that send to each other cannot wait for each other. Routing allocates nothing.
/// </remarks>
public sealed class ApicBus : IMsiSink, IKernelInterruptsClient
{
    /// <summary>Bits 31:20 of the addresses that are interrupt messages.</summary>
    private const ulong MsiWindow = 0xfee;

    // Wiring
    private readonly Lock _attaching = new();
    private volatile LocalApic[] _apics = [];
    private volatile LocalApic?[] _byId = [];
    private volatile IoApic[] _ioApics = [];
    private volatile IInterruptAcknowledge? _external;
    private volatile IKernelInterrupts? _kernel;

    // State
    private volatile bool _lint0;
    private volatile bool _lint1;
    private int _rotation;

    public ApicBus()
    {
        Lint0 = IrqLine.From(SetLint0);
        Lint1 = IrqLine.From(SetLint1);
    }

    /// <summary>The wire to the LINT0 pins of all local APICs: the 8259s' INT output.</summary>
    public IIrqLine Lint0 { get; }

    /// <summary>The wire to the LINT1 pins of all local APICs: the board's NMI.</summary>
    public IIrqLine Lint1 { get; }

    /// <summary>Connects the 8259s, which give the vector of an external interrupt.</summary>
    public void ConnectExternal(IInterruptAcknowledge source) => _external = source;

    /// <summary>Has messages go to local APICs that are the accelerator's; those attached here only hold state. Before the guest runs.</summary>
    public void Connect(IKernelInterrupts kernel)
    {
        _kernel = kernel;
        kernel.Connect(this);
    }

    void IKernelInterruptsClient.EndOfInterrupt(byte vector) => BroadcastEoi(vector);

    int IKernelInterruptsClient.AcknowledgeExternal() => AcknowledgeExternal();

    /// <summary>The accelerator's interrupt controllers, where it has them.</summary>
    public IKernelInterrupts? Kernel => _kernel;

    /// <summary>A message-signalled interrupt. Writes outside FEE00000h-FEEFFFFFh are no interrupts and are ignored.</summary>
    public void Send(ulong address, uint data)
    {
        if (address >> 20 != MsiWindow)
            return;
        if (_kernel is { } kernel)
        {
            // Bits 11:5 are bits 14:8 of the destination; there they go into the address's upper half (api.rst, KVM_CAP_X2APIC_API).
            kernel.Send(address & ~0xfe0ul | (address >> 5 & 0x7f) << 40, data);
            return;
        }
        // Bits 11:5 extend the destination to 15 bits where the guest was told so; they are zero for everybody else.
        uint destination = (uint)(address >> 12 & 0xff) | (uint)(address >> 5 & 0x7f) << 8;
        bool level = (data & 1 << 15) != 0;
        if (level && (data & 1 << 14) == 0)
            return;
        ApicMessage message = new(
            (DeliveryMode)(data >> 8 & 7), (byte)data, level, destination, (address & 4) != 0, Wide: false, (address & 8) != 0);
        Deliver(message);
    }

    /// <summary>Routes a message to the APICs that it addresses.</summary>
    /// <returns>Whether one took it.</returns>
    public bool Deliver(in ApicMessage message)
    {
        if (_kernel is { } kernel)
            return kernel.Send(message.MsiAddress, message.MsiData);
        if (message.Mode == DeliveryMode.LowestPriority || (message.Redirectable && message.Logical && message.Mode == DeliveryMode.Fixed))
            return DeliverLowestPriority(message);
        if (!message.Logical && !message.IsBroadcast)
        {
            LocalApic?[] byId = _byId;
            LocalApic? target = message.Destination < (uint)byId.Length ? byId[message.Destination] : null;
            return target is not null && target.Accept(message.Mode, message.Vector, message.Level);
        }
        bool accepted = false;
        foreach (LocalApic apic in _apics)
        {
            if (apic.Matches(message))
                accepted |= apic.Accept(message.Mode, message.Vector, message.Level);
        }
        return accepted;
    }

    internal void Attach(LocalApic apic)
    {
        lock (_attaching)
        {
            LocalApic?[] byId = _byId;
            if (apic.Id < (uint)byId.Length && byId[apic.Id] is not null)
                throw new ArgumentException($"two local APICs have the ID {apic.Id}", nameof(apic));
            LocalApic?[] table = new LocalApic?[Math.Max(byId.Length, (int)apic.Id + 1)];
            Array.Copy(byId, table, byId.Length);
            table[apic.Id] = apic;
            _byId = table;
            _apics = [.. _apics, apic];
        }
        apic.SetLint0(_lint0);
        apic.SetLint1(_lint1);
    }

    internal void Attach(IoApic ioApic)
    {
        lock (_attaching)
            _ioApics = [.. _ioApics, ioApic];
    }

    /// <summary>Sends to the targets of a shorthand. The sender holds no lock.</summary>
    internal void Deliver(LocalApic sender, DestinationShorthand shorthand, in ApicMessage message)
    {
        // INIT and start-up have no meaning for the sender itself (SDM table "Valid Combinations for the Local APIC's ICR").
        bool self = message.Mode is not (DeliveryMode.Init or DeliveryMode.StartUp or DeliveryMode.RemoteRead);
        if (shorthand != DestinationShorthand.AllExcludingSelf && self)
            sender.Accept(message.Mode, message.Vector, message.Level);
        if (shorthand == DestinationShorthand.Self)
            return;
        foreach (LocalApic apic in _apics)
        {
            if (apic != sender)
                apic.Accept(message.Mode, message.Vector, message.Level);
        }
    }

    /// <summary>Tells the I/O APICs that a level-triggered vector was serviced. The sender holds no lock.</summary>
    internal void BroadcastEoi(byte vector)
    {
        if (_kernel is { HasWires: true } kernel)
        {
            kernel.EndLevel(vector);
            return;
        }
        foreach (IoApic ioApic in _ioApics)
            ioApic.EndOfInterrupt(vector);
    }

    /// <summary>A local APIC was switched on: level-triggered sources that nobody took try again. The caller holds no lock.</summary>
    internal void RetryLevels()
    {
        foreach (IoApic ioApic in _ioApics)
            ioApic.Retry();
    }

    /// <summary>Asks the 8259s for a vector. The caller holds no lock.</summary>
    /// <returns>-1 where there are none.</returns>
    internal int AcknowledgeExternal() => _external?.Acknowledge() ?? -1;

    private bool DeliverLowestPriority(in ApicMessage message)
    {
        LocalApic[] apics = _apics;
        if (apics.Length == 0)
            return false;
        // Equals take turns, as with the rotating arbitration ID of the APIC bus.
        uint start = (uint)Interlocked.Increment(ref _rotation);
        LocalApic? best = null;
        for (uint i = 0; i < (uint)apics.Length; i++)
        {
            LocalApic apic = apics[(start + i) % (uint)apics.Length];
            if (apic.AcceptsFixed && apic.Matches(message) && (best is null || apic.ProcessorPriority < best.ProcessorPriority))
                best = apic;
        }
        return best is not null && best.Accept(DeliveryMode.Fixed, message.Vector, message.Level);
    }

    private void SetLint0(bool asserted)
    {
        _lint0 = asserted;
        if (_kernel is { HasWires: false } kernel)
            kernel.SetExternal(asserted);
        foreach (LocalApic apic in _apics)
            apic.SetLint0(asserted);
    }

    private void SetLint1(bool asserted)
    {
        if (asserted && !_lint1)
            _kernel?.Nmi();
        _lint1 = asserted;
        foreach (LocalApic apic in _apics)
            apic.SetLint1(asserted);
    }
}
