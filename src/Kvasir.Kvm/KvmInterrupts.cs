using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;

namespace Kvasir.Kvm;

/// <summary>A chip that KVM keeps (KVM_IRQCHIP_...).</summary>
public enum KernelChip
{
    MasterPic = 0,
    SlavePic = 1,
    IoApic = 2,
}

/// <summary>The interrupt controllers that KVM keeps for a VM (Documentation/virt/kvm/api.rst, KVM_CREATE_IRQCHIP and KVM_CAP_SPLIT_IRQCHIP).</summary>
public sealed unsafe class KvmInterrupts : IKernelInterrupts
{
    /// <summary>Pins of the I/O APIC, which are interrupts 0 to 23.</summary>
    private const int Pins = 24;

    /// <summary>The pin that ISA interrupt request 0 is wired to, as the board's tables say.</summary>
    private const int PinOfIrq0 = 2;

    /// <summary>The first of sixteen interrupts that lead to the 8259s alone.</summary>
    private const uint FirstPicInput = 32;

    /// <summary>The first interrupt for messages that event descriptors send.</summary>
    private const uint FirstMessage = 64;

    private const int PicInputs = 16;

    /// <summary>Where struct kvm_ioapic_state has its table, and an entry's remote IRR.</summary>
    private const int RedirectionTable = 24;
    private const ulong RemoteIrr = 1 << 14;

    private const uint X2ApicWideIds = 1;
    private const uint X2ApicNoBroadcastQuirk = 2;

    /// <summary>Bytes of a chip's state (union of struct kvm_irqchip).</summary>
    public const int ChipSize = 512;

    /// <summary>Bytes of the PIT's state (struct kvm_pit_state2).</summary>
    public const int PitSize = 112;

    private static readonly KernelChip[] s_chips = [KernelChip.MasterPic, KernelChip.SlavePic, KernelChip.IoApic];

    // Wiring
    private readonly KvmVm _vm;
    private IKernelInterruptsClient? _client;

    // State
    private readonly Lock _lock = new();
    private readonly Lock _lines = new();
    private readonly (ulong Address, uint Data)?[] _pinMessages = new (ulong, uint)?[Pins];
    private readonly SortedDictionary<uint, (ulong Address, uint Data)> _messages = [];
    private readonly KvmIrqChipState[] _powerOn = new KvmIrqChipState[s_chips.Length];
    private KvmPitState _pitPowerOn;
    private volatile bool _external;

    /// <summary>Makes them, before the VM has a vCPU.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    internal KvmInterrupts(KvmVm vm, KernelIrqChip kind)
    {
        _vm = vm;
        HasWires = kind == KernelIrqChip.On;
        // IDs of more than eight bits; on a KVM without, there are none.
        _ = vm.TryEnable(KvmCapability.X2ApicApi, X2ApicWideIds | X2ApicNoBroadcastQuirk);
        if (!HasWires)
        {
            if (!vm.TryEnable(KvmCapability.SplitIrqChip, Pins))
                throw new LinuxException("this host's KVM does not keep local APICs alone");
            UpdateRoutes();
            return;
        }
        Check(Ioctl(KvmRequest.CreateIrqChip, null), "make KVM's interrupt controllers");
        KvmPitConfiguration pit = new() { Flags = KvmPitConfiguration.WithSpeakerPort };
        Check(Ioctl(KvmRequest.CreatePit, &pit), "make KVM's timer");
        UpdateRoutes();
        for (int i = 0; i < s_chips.Length; i++)
        {
            KvmIrqChipState state = new() { Chip = (uint)s_chips[i] };
            Check(Ioctl(KvmRequest.GetIrqChip, &state), "read KVM's interrupt controllers");
            _powerOn[i] = state;
        }
        KvmPitState pitState;
        Check(Ioctl(KvmRequest.GetPit, &pitState), "read KVM's timer");
        _pitPowerOn = pitState;
    }

    public bool HasWires { get; }

    /// <summary>The board's 8259s ask for an interrupt.</summary>
    internal bool ExternalWaits => _external;

    public void Connect(IKernelInterruptsClient client) => _client = client;

    public bool Send(ulong address, uint data)
    {
        KvmMsi message = new() { AddressLow = (uint)address, AddressHigh = (uint)(address >> 32), Data = data };
        // A message that nobody takes, or that KVM finds wrong, is none.
        return Ioctl(KvmRequest.SignalMsi, &message) > 0;
    }

    public void SetRoute(int pin, (ulong Address, uint Data)? message)
    {
        lock (_lock)
        {
            if (_pinMessages[pin] == message)
                return;
            _pinMessages[pin] = message;
            UpdateRoutes();
        }
    }

    public void SetPin(int pin, bool asserted) => SetLine((uint)pin, asserted);

    public void SetPicInput(int input, bool asserted) => SetLine(FirstPicInput + (uint)input, asserted);

    public void EndLevel(byte vector)
    {
        // A level that changed between the two requests would be lost.
        lock (_lines)
        {
            KvmIrqChipState state = new() { Chip = (uint)KernelChip.IoApic };
            Check(Ioctl(KvmRequest.GetIrqChip, &state), "read KVM's interrupt controllers");
            Span<ulong> entries = MemoryMarshal.Cast<byte, ulong>(new Span<byte>(state.Union + RedirectionTable, Pins * sizeof(ulong)));
            bool ended = false;
            foreach (ref ulong entry in entries)
            {
                if ((byte)entry != vector || (entry & RemoteIrr) == 0)
                    continue;
                entry &= ~RemoteIrr;
                ended = true;
            }
            // KVM sends again what is still asserted.
            if (ended)
                Check(Ioctl(KvmRequest.SetIrqChip, &state), "write KVM's interrupt controllers");
        }
    }

    public void SetPitReplaced(bool replaced)
    {
        KvmPitState state;
        Check(Ioctl(KvmRequest.GetPit, &state), "read KVM's timer");
        state.Flags = replaced ? state.Flags | KvmPitState.ReplacedByHpet : state.Flags & ~KvmPitState.ReplacedByHpet;
        Check(Ioctl(KvmRequest.SetPit, &state), "write KVM's timer");
    }

    public void SetExternal(bool asserted)
    {
        _external = asserted;
        // LINT0 of the boot processor alone is programmed to let it in.
        if (asserted)
            _vm.BootProcessor?.InterruptChanged();
    }

    public void Nmi() => _vm.BootProcessor?.Nmi();

    public void Reset()
    {
        _external = false;
        if (!HasWires)
            return;
        for (int i = 0; i < s_chips.Length; i++)
        {
            KvmIrqChipState state = _powerOn[i];
            Check(Ioctl(KvmRequest.SetIrqChip, &state), "reset KVM's interrupt controllers");
        }
        KvmPitState pit = _pitPowerOn;
        Check(Ioctl(KvmRequest.SetPit, &pit), "reset KVM's timer");
    }

    /// <summary>The time that the PIT's load times are of: CLOCK_MONOTONIC, in nanoseconds.</summary>
    public static long PitNow => Stopwatch.GetTimestamp();

    /// <summary>Takes out the state of a chip. Only with <see cref="HasWires"/>.</summary>
    /// <param name="chip">Which.</param>
    /// <param name="state">Gets <see cref="ChipSize"/> bytes.</param>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void GetChip(KernelChip chip, Span<byte> state)
    {
        KvmIrqChipState raw = new() { Chip = (uint)chip };
        Check(Ioctl(KvmRequest.GetIrqChip, &raw), "read KVM's interrupt controllers");
        new ReadOnlySpan<byte>(raw.Union, ChipSize).CopyTo(state);
    }

    /// <summary>Puts it in.</summary>
    /// <inheritdoc cref="GetChip"/>
    public void SetChip(KernelChip chip, ReadOnlySpan<byte> state)
    {
        KvmIrqChipState raw = new() { Chip = (uint)chip };
        state[..ChipSize].CopyTo(new Span<byte>(raw.Union, ChipSize));
        Check(Ioctl(KvmRequest.SetIrqChip, &raw), "write KVM's interrupt controllers");
    }

    /// <summary>Takes out the state of the PIT. Only with <see cref="HasWires"/>.</summary>
    /// <param name="state">Gets <see cref="PitSize"/> bytes.</param>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void GetPit(Span<byte> state)
    {
        KvmPitState raw;
        Check(Ioctl(KvmRequest.GetPit, &raw), "read KVM's timer");
        new ReadOnlySpan<byte>(&raw, PitSize).CopyTo(state);
    }

    /// <summary>Puts it in.</summary>
    /// <inheritdoc cref="GetPit"/>
    public void SetPit(ReadOnlySpan<byte> state)
    {
        KvmPitState raw;
        state[..PitSize].CopyTo(new Span<byte>(&raw, PitSize));
        Check(Ioctl(KvmRequest.SetPit, &raw), "write KVM's timer");
    }

    /// <summary>Has an event descriptor send a message, from inside the kernel, each time that somebody signals it.</summary>
    /// <returns>Takes that back when it is disposed.</returns>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public IDisposable Attach(EventFd signal, ulong address, uint data)
    {
        lock (_lock)
        {
            uint gsi = FirstMessage;
            while (_messages.ContainsKey(gsi))
                gsi++;
            _messages.Add(gsi, (address, data));
            try
            {
                UpdateRoutes();
                KvmIrqFd request = new() { Fd = signal.Fd, Gsi = gsi };
                Check(Ioctl(KvmRequest.SetIrqFd, &request), "have an event descriptor interrupt the guest");
            }
            catch
            {
                _messages.Remove(gsi);
                throw;
            }
            return new Attachment(this, signal, gsi);
        }
    }

    internal void EndOfInterrupt(byte vector) => _client?.EndOfInterrupt(vector);

    internal int AcknowledgeExternal() => _client?.AcknowledgeExternal() ?? -1;

    private void Detach(EventFd signal, uint gsi)
    {
        lock (_lock)
        {
            KvmIrqFd request = new() { Fd = signal.Fd, Gsi = gsi, Flags = KvmIrqFd.Deassign };
            Check(Ioctl(KvmRequest.SetIrqFd, &request), "take an event descriptor back");
            _messages.Remove(gsi);
            UpdateRoutes();
        }
    }

    private void SetLine(uint gsi, bool asserted)
    {
        KvmIrqLevel level = new() { Gsi = gsi, Level = asserted ? 1u : 0 };
        lock (_lines)
            Check(Ioctl(KvmRequest.SetIrqLine, &level), "set an interrupt line");
    }

    /// <summary>Gives KVM the whole table. The lock is held, or nobody else is there yet.</summary>
    private void UpdateRoutes()
    {
        List<KvmIrqRoute> routes = [];
        if (HasWires)
            AddWires(routes);
        for (int pin = 0; pin < Pins; pin++)
        {
            if (_pinMessages[pin] is { } message)
                routes.Add(Route((uint)pin, message));
        }
        foreach ((uint gsi, (ulong Address, uint Data) message) in _messages)
            routes.Add(Route(gsi, message));
        // A count, flags, then the rows (struct kvm_irq_routing).
        byte[] table = new byte[8 + routes.Count * sizeof(KvmIrqRoute)];
        MemoryMarshal.Write(table, routes.Count);
        MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(routes)).CopyTo(table.AsSpan(8));
        fixed (byte* raw = table)
            Check(Ioctl(KvmRequest.SetGsiRouting, raw), "route interrupts");
    }

    private static void AddWires(List<KvmIrqRoute> routes)
    {
        // KVM's PIT drives interrupt 0: request 0 of the ISA bus.
        routes.Add(new KvmIrqRoute { Gsi = 0, Type = KvmIrqRoute.ToChip, Chip = (uint)KernelChip.MasterPic, Pin = 0 });
        routes.Add(new KvmIrqRoute { Gsi = 0, Type = KvmIrqRoute.ToChip, Chip = (uint)KernelChip.IoApic, Pin = PinOfIrq0 });
        for (uint pin = 1; pin < Pins; pin++)
            routes.Add(new KvmIrqRoute { Gsi = pin, Type = KvmIrqRoute.ToChip, Chip = (uint)KernelChip.IoApic, Pin = pin });
        for (uint input = 0; input < PicInputs; input++)
            routes.Add(new KvmIrqRoute { Gsi = FirstPicInput + input, Type = KvmIrqRoute.ToChip, Chip = (uint)(input < 8 ? KernelChip.MasterPic : KernelChip.SlavePic), Pin = input & 7 });
    }

    private static KvmIrqRoute Route(uint gsi, (ulong Address, uint Data) message) => new()
    {
        Gsi = gsi,
        Type = KvmIrqRoute.ToMessage,
        AddressLow = (uint)message.Address,
        AddressHigh = (uint)(message.Address >> 32),
        Data = message.Data,
    };

    private int Ioctl(KvmRequest request, void* argument) => _vm.Calls.Ioctl(_vm.Fd, request, argument);

    private static void Check(int result, string action) => KvmSystem.Check(result, action);

    private sealed class Attachment(KvmInterrupts owner, EventFd signal, uint gsi) : IDisposable
    {
        private bool _disposed;

        public void Dispose()
        {
            if (_disposed)
                return;
            _disposed = true;
            owner.Detach(signal, gsi);
        }
    }
}
