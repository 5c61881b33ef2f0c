using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>A vCPU under KVM. With its local APIC in user space, HLT and waiting for a start-up IPI happen here; else in the kernel.</summary>
public sealed unsafe partial class KvmVcpu : IVcpu
{
    [Flags]
    private enum Work
    {
        None = 0,
        Interrupt = 1 << 0,
        Nmi = 1 << 1,
        Init = 1 << 2,
        Sipi = 1 << 3,
        Kick = 1 << 4,
    }

    // Wiring
    private readonly KvmVm _vm;
    private readonly IKvmCalls _calls;
    private readonly KvmVcpuWiring _wiring;
    private readonly PortBus _ports;
    private readonly MmioBus _mmio;
    private readonly ILocalApic _apic;
    private readonly VmClock _clock;

    /// <summary>The local APIC is KVM's: halting, start-up and interrupts are, too.</summary>
    private readonly KvmInterrupts? _kernelInterrupts;

    private readonly CoalescedWrites? _coalesced;

    // State shared with other threads. In native memory, so that a thread can sleep on it.
    private readonly int* _pending;
    private int _sleeping;
    private int _inKernel;
    private int _sipiVector;
    private volatile int _thread;

    // State of the vCPU's own thread
    private int _fd = -1;
    private byte* _map;
    private VcpuActivity _activity;
    private bool _completing;
    private bool _stateWritten;
    private byte _taskPriority;
    private bool _disposed;

    internal KvmVcpu(KvmVm vm, int index, KvmVcpuWiring wiring)
    {
        _vm = vm;
        _calls = vm.Calls;
        _wiring = wiring;
        _ports = wiring.Ports;
        _mmio = wiring.Mmio;
        _apic = wiring.Apic;
        _clock = wiring.Clock;
        _kernelInterrupts = vm.Interrupts;
        Index = index;
        // A futex word of its own, away from what others write.
        _pending = (int*)NativeMemory.AlignedAlloc(64, 64);
        *_pending = 0;
        try
        {
            _fd = KvmSystem.Check(_calls.Ioctl(vm.Fd, KvmRequest.CreateVcpu, (ulong)index), $"make vCPU {index}");
            KvmSystem.Check(_calls.Map(_fd, 0, (ulong)vm.System.VcpuMapSize, out _map), $"map the shared page of vCPU {index}");
            if (vm.Coalesced is { } coalesced)
            {
                coalesced.Connect(_map);
                _coalesced = coalesced;
            }
            if (vm.DirtyRingEntries != 0)
                DirtyRing = new DirtyRing(_calls, _fd, vm.DirtyRingEntries);
            SetCpuid();
            _msrs = FindMsrs();
            CpuState state = CpuState.AtReset(wiring.Signature);
            state.Activity = index == 0 ? VcpuActivity.Active : VcpuActivity.WaitForSipi;
            SetState(in state);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public int Index { get; }

    public string FailureReport { get; private set; } = "";

    /// <summary>KVM does not count.</summary>
    public ulong InstructionsRetired => 0;

    /// <summary>How often <see cref="Run"/> entered the guest.</summary>
    public ulong Entries { get; private set; }

    /// <summary>Hz of the guest's time stamp counter, which is the host's.</summary>
    /// <exception cref="LinuxException">KVM does not say.</exception>
    public ulong TscFrequency => (ulong)KvmSystem.Check(_calls.Ioctl(_fd, KvmRequest.GetTscFrequency, 0), "ask KVM for the guest's TSC frequency") * 1000;

    /// <summary>Where KVM notes the pages that the guest writes; null where it keeps bitmaps.</summary>
    internal DirtyRing? DirtyRing { get; }

    private KvmRunPage* Page => (KvmRunPage*)_map;

    public void InterruptChanged() => Post(Work.Interrupt);

    public void Nmi() => Post(Work.Nmi);

    public void Init() => Post(Work.Init);

    public void Sipi(byte vector)
    {
        Volatile.Write(ref _sipiVector, vector);
        Post(Work.Sipi);
    }

    /// <summary>The boards offer no system management mode: the signal ends here, as on the software CPU.</summary>
    public void Smi()
    {
    }

    public void Kick() => Post(Work.Kick);

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _vm.Forget(this);
        DirtyRing?.Unmap();
        _coalesced?.Disconnect(_map);
        if (_map != null)
            _calls.Unmap(_map, (ulong)_vm.System.VcpuMapSize);
        _map = null;
        if (_fd >= 0)
            _calls.Close(_fd);
        _fd = -1;
        NativeMemory.AlignedFree(_pending);
    }

    /// <summary>Leaves work for the vCPU and makes it look: wherever it is, none is lost.</summary>
    /// <remarks>
    /// The vCPU first clears immediate_exit and then takes the work; this does both in the other order, so that work left after the taking finds the
    /// flag set at the next entry. The signal is needed only by a vCPU that is, or may already be, inside KVM_RUN.
    /// </remarks>
    private void Post(Work work)
    {
        if (_disposed)
            return;
        Interlocked.Or(ref *_pending, (int)work);
        Volatile.Write(ref Page->ImmediateExit, 1);
        Interlocked.MemoryBarrier();
        if (Volatile.Read(ref _inKernel) != 0)
            KickSignal.Send(_thread);
        if (Volatile.Read(ref _sleeping) != 0)
            Futex.Wake(_pending);
    }

    private int Call(KvmRequest request, void* argument, string action)
    {
        int result = _calls.Ioctl(_fd, request, argument);
        return result >= 0 ? result : throw new LinuxException($"{action} of vCPU {Index}", -result);
    }

    private void SetCpuid()
    {
        const ulong stateToAvx = 7;
        List<CpuidEntry> model = [.. _wiring.Cpuid];
        Paravirtual.Apply(model, _vm.System.SupportedCpuid, _kernelInterrupts is not null);
        CpuidEntry[] table = GuestCpuid.Merge(model, _vm.System.SupportedCpuid, _vm.HasApicModes);
        _allowedXcr0 = GuestCpuid.AllowedXcr0(table);
        CpuidEntry[] shown = WriteCpuid(table);
        if (!GuestCpuid.IsForced(table, shown))
            return;
        WriteCpuid(GuestCpuid.Complete(table, _vm.System.SupportedCpuid));
        _allowedXcr0 = stateToAvx;
    }

    /// <summary>Gives KVM the table.</summary>
    /// <returns>What KVM made of it.</returns>
    private CpuidEntry[] WriteCpuid(CpuidEntry[] table)
    {
        byte* buffer = (byte*)NativeMemory.AllocZeroed((nuint)(8 + table.Length * sizeof(KvmCpuidEntry)));
        try
        {
            // SAFETY: a count, four bytes of padding, then as many entries as the count says.
            *(uint*)buffer = (uint)table.Length;
            KvmCpuidEntry* raw = (KvmCpuidEntry*)(buffer + 8);
            for (int i = 0; i < table.Length; i++)
            {
                raw[i].Function = table[i].Leaf;
                raw[i].Index = table[i].Subleaf;
                raw[i].Flags = table[i].HasSubleaves ? KvmCpuidEntry.SignificantIndex : 0;
                raw[i].Eax = table[i].Eax;
                raw[i].Ebx = table[i].Ebx;
                raw[i].Ecx = table[i].Ecx;
                raw[i].Edx = table[i].Edx;
            }
            Call(KvmRequest.SetCpuid, buffer, "set the CPUID leaves");
            Call(KvmRequest.GetCpuid, buffer, "read the CPUID leaves");
            CpuidEntry[] shown = new CpuidEntry[Math.Min(*(uint*)buffer, (uint)table.Length)];
            for (int i = 0; i < shown.Length; i++)
            {
                shown[i] = new CpuidEntry(
                    raw[i].Function, raw[i].Index, (raw[i].Flags & KvmCpuidEntry.SignificantIndex) != 0, raw[i].Eax, raw[i].Ebx, raw[i].Ecx, raw[i].Edx);
            }
            return shown;
        }
        finally
        {
            NativeMemory.Free(buffer);
        }
    }
}
