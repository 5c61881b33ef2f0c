using System;
using System.Collections.Generic;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>
/// One VM in KVM: its memory slots and what all its vCPUs share. Interrupt controllers are Kvasir's own, in user space, and KVM gets each interrupt by
/// number when the vCPU can take it; or some or all of them are KVM's.
/// </summary>
public sealed unsafe class KvmVm : IDisposable
{
    /// <summary>
    /// Four pages that KVM may need for itself on Intel processors, below the APICs' and firmware's space (Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
    /// </summary>
    private const ulong IdentityMapAddress = 0xfeff_c000;
    private const ulong TssAddress = IdentityMapAddress + 0x1000;

    // Reasons of MSR exits to ask for: not accepted, not known, filtered.
    private const ulong AllMsrExits = 1 | 2 | 4;

    // Wiring
    private readonly KvmSystem _system;
    private readonly Lock _lock = new();

    // State
    private readonly List<MemoryRegion> _slots = [];
    private readonly List<KvmVcpu> _vcpus = [];
    private int _fd = -1;
    private int _layout = -1;
    private bool _dirtyLog;
    private ulong? _clock;

    /// <summary>Makes the VM and gives it the guest's memory.</summary>
    /// <param name="system">Stays open longer than the VM; the VM does not close it.</param>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="dirtyRingEntries">
    /// Has each vCPU keep a ring of so many written pages, a power of two, where KVM offers it, instead of a bitmap of all memory: what a large guest that writes
    /// little is collected from faster.
    /// </param>
    /// <param name="mendsRing3">SYSCALL leaves the guest in ring 3 on this KVM (<see cref="SystemCallCheck"/>), and it raises #UD where it should not: the vCPUs mend that. Takes two breakpoints.</param>
    /// <param name="irqChip">Which interrupt controllers are KVM's.</param>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public KvmVm(KvmSystem system, GuestMemory memory, uint dirtyRingEntries = 0, bool mendsRing3 = false, KernelIrqChip irqChip = KernelIrqChip.Off)
    {
        _system = system;
        MendsRing3 = mendsRing3;
        Memory = memory;
        // A signal may interrupt the making of a VM; the kernel asks to try again.
        int fd;
        do
            fd = system.Calls.Ioctl(system.Fd, KvmRequest.CreateVm, 0);
        while (fd == -Errno.Interrupted);
        _fd = KvmSystem.Check(fd, "make a KVM virtual machine");
        try
        {
            ulong identity = IdentityMapAddress;
            KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.SetIdentityMapAddress, &identity), "set KVM's identity map address");
            KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.SetTssAddress, TssAddress), "set KVM's TSS address");
            if (dirtyRingEntries != 0)
                DirtyRingEntries = TryEnableDirtyRing(dirtyRingEntries);
            ExitsOnEmulationFailure = TryEnable(KvmCapability.ExitOnEmulationFailure, 1);
            if (irqChip != KernelIrqChip.Off)
                Interrupts = new KvmInterrupts(this, irqChip);
            HasMsrExits = system.Capability(KvmCapability.MsrFilter) > 0 && TryEnable(KvmCapability.UserSpaceMsr, AllMsrExits)
                && TryFilterMsrs();
            HasApicModes = Interrupts is null ? HasMsrExits : system.Capability(KvmCapability.TscDeadlineTimer) > 0;
            SharesRegisters = ((ulong)system.Capability(KvmCapability.SyncRegisters) & KvmSyncRegisters.All) == KvmSyncRegisters.All;
            if (system.Capability(KvmCapability.IoEventFdAnyLength) > 0)
                Doorbells = new KvmDoorbells(this);
            UpdateSlots();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public GuestMemory Memory { get; }

    /// <summary>Instructions that KVM's emulator does not know come back from any privilege level.</summary>
    public bool ExitsOnEmulationFailure { get; }

    /// <summary>Accesses to the APIC's MSRs, and to those that KVM does not know, come back.</summary>
    public bool HasMsrExits { get; }

    /// <summary>The x2APIC mode and the TSC deadline timer work.</summary>
    internal bool HasApicModes { get; }

    /// <summary>KVM can leave registers in the page that it shares with each vCPU.</summary>
    internal bool SharesRegisters { get; }

    /// <summary>Writes that KVM keeps for later; null: it keeps none.</summary>
    internal CoalescedWrites? Coalesced { get; private set; }

    /// <summary>Takes doorbells; null where KVM cannot.</summary>
    public IDoorbellTaker? Doorbells { get; }

    /// <summary>Doorbells that KVM has now.</summary>
    public int DoorbellsTaken => Doorbells is KvmDoorbells doorbells ? doorbells.Taken : 0;

    /// <summary>KVM's own interrupt controllers; null: it has none.</summary>
    public KvmInterrupts? Interrupts { get; }

    /// <summary>The vCPU that starts first, while it is there.</summary>
    internal KvmVcpu? BootProcessor
    {
        get
        {
            lock (_lock)
                return _vcpus.Find(static vcpu => vcpu.Index == 0);
        }
    }

    /// <summary>The vCPUs complete SYSCALL, and look at each #UD of ring 3.</summary>
    public bool MendsRing3 { get; }

    /// <summary>Entries of each vCPU's ring of written pages; 0: KVM keeps bitmaps.</summary>
    public uint DirtyRingEntries { get; }

    /// <summary>A ring was written over: from then on all memory counts as written at each look.</summary>
    public bool DirtyRingOverflowed { get; private set; }

    public IKvmCalls Calls => _system.Calls;

    internal KvmSystem System => _system;

    internal int Fd => _fd;

    /// <summary>Makes a vCPU in its power-on state.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public KvmVcpu CreateVcpu(int index, KvmVcpuWiring wiring)
    {
        KvmVcpu vcpu = new(this, index, wiring);
        lock (_lock)
            _vcpus.Add(vcpu);
        return vcpu;
    }

    /// <summary>
    /// Has KVM keep writes to ports until the guest leaves for something else, whatever vCPU it is on; they reach their devices before that does. For ports whose writes
    /// have no effect of their own. Before the VM has a vCPU.
    /// </summary>
    /// <returns>Whether KVM does.</returns>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public bool CoalesceWrites(PortBus ports, params ReadOnlySpan<ushort> numbers)
    {
        int page = _system.Capability(KvmCapability.CoalescedMmio);
        if (page <= 0 || _system.Capability(KvmCapability.CoalescedPio) <= 0 || (ulong)(page + 1) * GuestMemory.PageSize > (ulong)_system.VcpuMapSize)
            return false;
        Coalesced = new CoalescedWrites(ports, page);
        foreach (ushort number in numbers)
        {
            KvmCoalescedZone zone = new() { Address = number, Size = 1, IsPort = 1 };
            KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.RegisterCoalesced, &zone), "have KVM keep writes");
        }
        return true;
    }

    internal void Forget(KvmVcpu vcpu)
    {
        lock (_lock)
            _vcpus.Remove(vcpu);
    }

    /// <summary>Brings KVM's memory slots in line with the memory's regions. Only while no vCPU runs a guest that could miss them.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    internal void UpdateSlots()
    {
        if (Volatile.Read(ref _layout) == Memory.LayoutVersion)
            return;
        lock (_lock)
        {
            if (_layout == Memory.LayoutVersion)
                return;
            // What the rings hold is by slots as they are.
            if (_dirtyLog && DirtyRingEntries != 0)
                CollectDirtyRings();
            // Unchanged regions keep their slots and KVM what it has mapped of them; the others go first, as slots must not overlap.
            ReadOnlySpan<MemoryRegion> regions = Memory.Regions;
            for (int i = 0; i < _slots.Count; i++)
            {
                if (_slots[i].Length != 0 && (i >= regions.Length || _slots[i] != regions[i]))
                {
                    SetSlot(i, _slots[i] with { Length = 0 });
                    _slots[i] = default;
                }
            }
            for (int i = 0; i < regions.Length; i++)
            {
                if (i >= _slots.Count)
                    _slots.Add(default);
                if (_slots[i] == regions[i])
                    continue;
                SetSlot(i, regions[i]);
                _slots[i] = regions[i];
            }
            Volatile.Write(ref _layout, Memory.LayoutVersion);
        }
    }

    /// <summary>KVM's clock stands while the VM does. All vCPUs stand.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void PauseClock()
    {
        if (_system.Capability(KvmCapability.AdjustClock) <= 0)
            return;
        KvmClockData data;
        KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.GetClock, &data), "read KVM's clock");
        _clock = data.Clock;
    }

    /// <summary>It goes on from where it stood.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void ResumeClock()
    {
        if (_clock is not { } clock)
            return;
        _clock = null;
        KvmClockData data = new() { Clock = clock };
        KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.SetClock, &data), "set KVM's clock");
        lock (_lock)
        {
            foreach (KvmVcpu vcpu in _vcpus)
                vcpu.TellOfPause();
        }
    }

    /// <summary>Starts or ends the log of pages that the guest writes.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void SetDirtyLog(bool enabled)
    {
        lock (_lock)
        {
            _dirtyLog = enabled;
            for (int i = 0; i < _slots.Count; i++)
            {
                if (_slots[i].Length != 0)
                    SetSlot(i, _slots[i]);
            }
            if (!enabled && DirtyRingEntries != 0)
                CollectDirtyRings();
        }
    }

    /// <summary>Marks each page that the guest wrote since the last call <see cref="PageFlags.Dirty"/> in <see cref="Memory"/>, and starts anew. Any thread.</summary>
    /// <remarks>With rings, a processor that keeps a log of its own shows its last writes when its vCPU leaves the guest: stop or kick all of them for the last look.</remarks>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void CollectDirtyPages()
    {
        lock (_lock)
        {
            if (!_dirtyLog)
                throw new InvalidOperationException("the dirty log is off");
            if (DirtyRingEntries != 0)
            {
                CollectDirtyRings();
                return;
            }
            for (int i = 0; i < _slots.Count; i++)
            {
                if (_slots[i].Length != 0 && _slots[i].Kind == MemoryKind.Ram)
                    CollectDirtyPages(i);
            }
        }
    }

    public void Dispose()
    {
        if (_fd < 0)
            return;
        Calls.Close(_fd);
        _fd = -1;
    }

    /// <summary>Makes room in the rings, whether or not anybody wants to know.</summary>
    /// <returns>False: there was nothing in them.</returns>
    /// <exception cref="LinuxException">KVM refused.</exception>
    internal bool DrainDirtyRings()
    {
        lock (_lock)
            return CollectDirtyRings();
    }

    /// <returns>Whether there was anything in them.</returns>
    private bool CollectDirtyRings()
    {
        bool any = false;
        foreach (KvmVcpu vcpu in _vcpus)
        {
            uint taken = 0;
            if (DirtyRingOverflowed)
                vcpu.DirtyRing!.TryCatchUp();
            while (taken < DirtyRingEntries && vcpu.DirtyRing!.TryTake(out uint slot, out ulong page))
            {
                any = true;
                taken++;
                // The ring's bytes are KVM's, in memory that this process can write: a slot that is none is not followed.
                if (slot < _slots.Count && page < _slots[(int)slot].Length / GuestMemory.PageSize)
                    Memory.SetFlag(_slots[(int)slot].Offset / GuestMemory.PageSize + page, PageFlags.Dirty);
            }
            // KVM is to come back before a ring is full; one that emulates kernels was seen to go on, over what it had noted.
            DirtyRingOverflowed |= taken == DirtyRingEntries;
        }
        if (DirtyRingOverflowed)
            MarkAllDirty();
        if (any)
            KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.ResetDirtyRings, 0), "reset the rings of written pages");
        return any;
    }

    private void MarkAllDirty()
    {
        foreach (MemoryRegion region in _slots)
        {
            if (region.Kind != MemoryKind.Ram)
                continue;
            for (ulong page = 0; page < region.Length / GuestMemory.PageSize; page++)
                Memory.SetFlag(region.Offset / GuestMemory.PageSize + page, PageFlags.Dirty);
        }
    }

    private uint TryEnableDirtyRing(uint entries)
    {
        if (!BitOperations.IsPow2(entries))
            throw new ArgumentException($"a ring has a power of two of entries, not {entries}", nameof(entries));
        Span<KvmCapability> kinds = [KvmCapability.DirtyRingAcquireRelease, KvmCapability.DirtyRing];
        foreach (KvmCapability kind in kinds)
        {
            ulong bytes = entries * (ulong)sizeof(KvmDirtyEntry);
            if (bytes <= (ulong)_system.Capability(kind) && TryEnable(kind, bytes))
                return entries;
        }
        return 0;
    }

    private void CollectDirtyPages(int slot)
    {
        MemoryRegion region = _slots[slot];
        ulong words = (region.Length / GuestMemory.PageSize + 63) / 64;
        ulong* bitmap = (ulong*)NativeMemory.AllocZeroed((nuint)words, sizeof(ulong));
        try
        {
            // SAFETY: KVM writes one bit for each page of the slot, rounded up to 64.
            KvmDirtyLog log = new() { Slot = (uint)slot, Bitmap = (ulong)bitmap };
            KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.GetDirtyLog, &log), "read KVM's dirty log");
            ulong first = region.Offset / GuestMemory.PageSize;
            for (ulong word = 0; word < words; word++)
            {
                for (ulong left = bitmap[word]; left != 0; left &= left - 1)
                    Memory.SetFlag(first + word * 64 + (ulong)ulong.TrailingZeroCount(left), PageFlags.Dirty);
            }
        }
        finally
        {
            NativeMemory.Free(bitmap);
        }
    }

    private void SetSlot(int slot, MemoryRegion region)
    {
        uint flags = region.Kind == MemoryKind.Rom ? KvmMemoryRegion.ReadOnly : _dirtyLog ? KvmMemoryRegion.LogDirtyPages : 0;
        KvmMemoryRegion raw = new()
        {
            Slot = (uint)slot,
            Flags = region.Length == 0 ? 0 : flags,
            GuestAddress = region.Start,
            Size = region.Length,
            HostAddress = (ulong)Memory.Host + region.Offset,
        };
        KvmSystem.Check(Calls.Ioctl(_fd, KvmRequest.SetUserMemoryRegion, &raw), $"give KVM the guest's memory at {region.Start:x}h");
    }

    internal bool TryEnable(KvmCapability capability, ulong argument)
    {
        if (_system.Capability(capability) <= 0)
            return false;
        KvmEnableCapability request = new() { Capability = (uint)capability, Argument0 = argument };
        return Calls.Ioctl(_fd, KvmRequest.EnableCapability, &request) == 0;
    }

    /// <summary>
    /// The APIC base and the TSC deadline belong to Kvasir's APIC, where that serves; x2APIC registers come back by themselves, as KVM has no APIC then. Where system calls are
    /// mended, their entry's address is heard of.
    /// </summary>
    private bool TryFilterMsrs()
    {
        if (Interrupts is not null && !MendsRing3)
            return true;
        // A bit that is clear denies, and a denied access is reported.
        ulong none = 0;
        KvmMsrFilter filter = new();
        if (Interrupts is null)
        {
            filter.Range0 = Denied(Msr.ApicBase, KvmMsrFilterRange.Read | KvmMsrFilterRange.Write, &none);
            filter.Range1 = Denied(Msr.TscDeadline, KvmMsrFilterRange.Read | KvmMsrFilterRange.Write, &none);
        }
        if (MendsRing3)
            filter.Range2 = Denied(Msr.Lstar, KvmMsrFilterRange.Write, &none);
        return Calls.Ioctl(_fd, KvmRequest.SetMsrFilter, &filter) == 0;
    }

    private static KvmMsrFilterRange Denied(uint msr, uint access, ulong* bitmap) => new() { Flags = access, Count = 1, Base = msr, Bitmap = (ulong)bitmap };
}
