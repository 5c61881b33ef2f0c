using System;
using System.Runtime.InteropServices;

namespace Kvasir.Network;

/// <summary>Flags of <see cref="VnetHeader"/>.</summary>
[Flags]
public enum VnetFlags : byte
{
    None = 0,

    /// <summary>The checksum is to be completed from <see cref="VnetHeader.ChecksumStart"/> on.</summary>
    NeedsChecksum = 1,

    /// <summary>The checksum was verified.</summary>
    DataValid = 2,
}

/// <summary>What kind of large segment a frame is.</summary>
[Flags]
public enum VnetSegments : byte
{
    None = 0,
    Tcp4 = 1,
    Udp = 3,
    Tcp6 = 4,
    UdpL4 = 5,
    Ecn = 0x80,
}

/// <summary>
/// What travels with a frame: work on it that was left to the receiver (virtio 1.2, 5.1.6 "Device Operation", struct virtio_net_hdr). Little endian, as
/// the kernel's tap devices and the guest's ring have it.
/// </summary>
[StructLayout(LayoutKind.Sequential, Pack = 1)]
public struct VnetHeader
{
    /// <summary>Bytes, with the count of buffers.</summary>
    public const int Size = 12;

    public VnetFlags Flags;
    public VnetSegments Segments;

    /// <summary>Bytes of headers before the payload; a hint only.</summary>
    public ushort HeaderLength;

    /// <summary>Bytes of payload in each segment.</summary>
    public ushort SegmentSize;

    /// <summary>Where the checksum begins.</summary>
    public ushort ChecksumStart;

    /// <summary>Where it is stored, from there.</summary>
    public ushort ChecksumOffset;

    /// <summary>Buffers of the guest that the frame takes (merged receive buffers).</summary>
    public ushort BufferCount;

    /// <summary>The kind without the ECN flag.</summary>
    public readonly VnetSegments Kind => Segments & ~VnetSegments.Ecn;
}

/// <summary>Work on a frame that one side can leave to the other.</summary>
[Flags]
public enum NetworkOffloads
{
    None = 0,
    Checksum = 1 << 0,
    Tso4 = 1 << 1,
    Tso6 = 1 << 2,
    TsoEcn = 1 << 3,
    All = Checksum | Tso4 | Tso6 | TsoEcn,
}
