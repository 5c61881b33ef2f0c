using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Kvm;

/// <summary>
/// The ring in which KVM notes each page that one vCPU writes (Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING). KVM fills entries and marks them
/// dirty; whoever harvests marks them for reset, and KVM_RESET_DIRTY_RINGS protects their pages again. Harvesting is serialized by the VM's lock.
/// </summary>
internal sealed unsafe class DirtyRing
{
    /// <summary>Where a vCPU's descriptor maps it.</summary>
    private const ulong MapOffset = 64 * 4096;

    private const uint Dirty = 1;
    private const uint Reset = 2;

    // Configuration
    private readonly IKvmCalls _calls;
    private readonly ulong _length;
    private readonly uint _mask;

    // State
    private KvmDirtyEntry* _entries;
    private uint _next;

    /// <param name="calls">The seam to KVM.</param>
    /// <param name="vcpu">The vCPU's descriptor.</param>
    /// <param name="entries">How many the VM was told to have; a power of two.</param>
    /// <exception cref="LinuxException">It cannot be mapped.</exception>
    public DirtyRing(IKvmCalls calls, int vcpu, uint entries)
    {
        _calls = calls;
        _length = entries * (ulong)sizeof(KvmDirtyEntry);
        _mask = entries - 1;
        KvmSystem.Check(calls.Map(vcpu, MapOffset, _length, out byte* address), "map the ring of written pages");
        _entries = (KvmDirtyEntry*)address;
    }

    /// <summary>Takes the next written page out of the ring.</summary>
    /// <param name="slot">Its memory slot.</param>
    /// <param name="page">Its number in the slot.</param>
    /// <returns>False: there is none.</returns>
    public bool TryTake(out uint slot, out ulong page)
    {
        (slot, page) = (0, 0);
        if (_entries == null)
            return false;
        // SAFETY: the index is masked to the ring's length.
        KvmDirtyEntry* entry = _entries + (_next & _mask);
        // The flag is set after, and read before, what it covers.
        if ((Volatile.Read(ref entry->Flags) & Dirty) == 0)
            return false;
        slot = entry->Slot & 0xffff;
        page = entry->Offset;
        Volatile.Write(ref entry->Flags, Reset);
        _next++;
        return true;
    }

    /// <summary>
    /// After KVM wrote over entries: goes on at the next entry that is dirty, and gives those before it, which KVM counts as filled, back to it.
    /// </summary>
    /// <returns>False: none is dirty.</returns>
    public bool TryCatchUp()
    {
        if (_entries == null)
            return false;
        for (uint ahead = 0; ahead <= _mask; ahead++)
        {
            // SAFETY: indices are masked to the ring's length.
            if ((Volatile.Read(ref _entries[(_next + ahead) & _mask].Flags) & Dirty) == 0)
                continue;
            for (uint i = 0; i < ahead; i++)
                Volatile.Write(ref _entries[(_next + i) & _mask].Flags, Reset);
            _next += ahead;
            return true;
        }
        return false;
    }

    public void Unmap()
    {
        if (_entries == null)
            return;
        _calls.Unmap((byte*)_entries, _length);
        _entries = null;
    }
}
