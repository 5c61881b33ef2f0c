using System.Threading;
using Kvasir.Core;

namespace Kvasir.Kvm;

/// <summary>
/// The ring of writes that KVM keeps for later (Documentation/virt/kvm/api.rst, KVM_REGISTER_COALESCED_MMIO). A VM has one, in every vCPU's mapping; whoever comes
/// back from the guest empties it.
/// </summary>
internal sealed unsafe class CoalescedWrites(PortBus ports, int page)
{
    /// <summary>Bytes before the entries: the index of the first, and that behind the last.</summary>
    private const int HeaderSize = 8;

    private const uint Entries = ((uint)GuestMemory.PageSize - HeaderSize) / 24;

    private readonly Lock _lock = new();
    private uint* _ring;

    /// <summary>Writes that came this way.</summary>
    public ulong Count { get; private set; }

    /// <summary>Tells where a vCPU's mapping is; the first one serves all.</summary>
    public void Connect(byte* map)
    {
        lock (_lock)
        {
            if (_ring == null)
                _ring = (uint*)(map + page * (int)GuestMemory.PageSize);
        }
    }

    /// <summary>That mapping goes.</summary>
    public void Disconnect(byte* map)
    {
        lock (_lock)
        {
            if (_ring == (uint*)(map + page * (int)GuestMemory.PageSize))
                _ring = null;
        }
    }

    /// <summary>Has the devices see what was written.</summary>
    public void Drain()
    {
        // SAFETY: the ring is a page of KVM's; indices are checked against its size.
        uint* ring = _ring;
        if (ring == null || Volatile.Read(ref ring[0]) == Volatile.Read(ref ring[1]))
            return;
        lock (_lock)
        {
            if (_ring == null)
                return;
            while (true)
            {
                uint first = ring[0];
                if (first == Volatile.Read(ref ring[1]) || first >= Entries)
                    return;
                KvmCoalescedWrite write = ((KvmCoalescedWrite*)((byte*)ring + HeaderSize))[first];
                if (write.IsPort != 0 && write.Length is 1 or 2 or 4)
                    ports.Write((ushort)write.Address, (AccessSize)write.Length, (uint)write.Data);
                Count++;
                // The entry is KVM's again from here on.
                Volatile.Write(ref ring[0], (first + 1) % Entries);
            }
        }
    }
}
