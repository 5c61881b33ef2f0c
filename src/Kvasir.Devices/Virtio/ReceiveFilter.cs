using System;
using System.Buffers.Binary;
using System.Threading;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// Which frames from the wire a NIC takes: by address and by VLAN (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3). The control queue's thread writes, threads that carry
/// frames read: a change replaces the whole table.
/// </summary>
public sealed class ReceiveFilter
{
    public const int AddressSize = 6;

    /// <summary>Addresses that are kept; with more, all are taken (the specification allows it).</summary>
    public const int MaximumAddresses = 64;

    private const int VlanCount = 4096;
    private const ushort VlanType = 0x8100;

    private volatile Table _table = new();

    /// <summary>What a driver can set, and what a snapshot keeps.</summary>
    public sealed record Table
    {
        public ulong Address { get; init; }

        /// <summary>All frames, whatever their address: how a device starts.</summary>
        public bool Promiscuous { get; init; } = true;

        public bool AllMulticast { get; init; }

        public bool AllUnicast { get; init; }

        public bool NoMulticast { get; init; }

        public bool NoUnicast { get; init; }

        public bool NoBroadcast { get; init; }

        public ulong[] Unicast { get; init; } = [];

        public ulong[] Multicast { get; init; } = [];

        /// <summary>One bit for each VLAN; null: they are not looked at.</summary>
        public ulong[]? Vlans { get; init; }

        /// <summary>It can be what a driver set.</summary>
        public bool IsSound => Unicast is { Length: <= MaximumAddresses } && Multicast is { Length: <= MaximumAddresses } && Vlans is null or { Length: VlanCount / 64 };
    }

    public Table Current => _table;

    public void Set(Table table) => _table = table;

    /// <summary>Changes the table. One writer at a time.</summary>
    public void Change(Func<Table, Table> change) => Interlocked.Exchange(ref _table!, change(_table));

    public void SetVlan(int vlan, bool member) => Change(table =>
    {
        ulong[] vlans = table.Vlans is { } old ? (ulong[])old.Clone() : new ulong[VlanCount / 64];
        if (member)
            vlans[vlan >> 6] |= 1ul << (vlan & 63);
        else
            vlans[vlan >> 6] &= ~(1ul << (vlan & 63));
        return table with { Vlans = vlans };
    });

    /// <summary>An empty VLAN table: untagged frames alone pass.</summary>
    public static ulong[] NoVlans() => new ulong[VlanCount / 64];

    public static ulong ReadAddress(ReadOnlySpan<byte> bytes) => BinaryPrimitives.ReadUInt32BigEndian(bytes) | (ulong)BinaryPrimitives.ReadUInt16BigEndian(bytes[4..]) << 32;

    public bool Takes(ReadOnlySpan<byte> frame)
    {
        Table table = _table;
        if (frame.Length < 14)
            return false;
        if (table.Vlans is { } vlans && BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) == VlanType && frame.Length >= 16)
        {
            int vlan = BinaryPrimitives.ReadUInt16BigEndian(frame[14..]) & (VlanCount - 1);
            if ((vlans[vlan >> 6] >> (vlan & 63) & 1) == 0)
                return false;
        }
        if (table.Promiscuous)
            return true;
        ulong to = ReadAddress(frame);
        const ulong broadcast = 0xffff_ffff_ffff;
        if (to == broadcast)
            return !table.NoBroadcast;
        if ((frame[0] & 1) != 0)
            return !table.NoMulticast && (table.AllMulticast || Array.IndexOf(table.Multicast, to) >= 0);
        return !table.NoUnicast && (table.AllUnicast || to == table.Address || Array.IndexOf(table.Unicast, to) >= 0);
    }
}
