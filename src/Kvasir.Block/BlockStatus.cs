using System;

namespace Kvasir.Block;

/// <summary>What a run of bytes is made of.</summary>
[Flags]
public enum BlockFlags
{
    None = 0,

    /// <summary>Stored as data.</summary>
    Data = 1 << 0,

    /// <summary>Reads as zeros.</summary>
    Zero = 1 << 1,

    /// <summary>Decided by this node, not by its backing file.</summary>
    Allocated = 1 << 2,

    /// <summary><see cref="BlockStatus.HostOffset"/> holds the place in the node's file.</summary>
    OffsetValid = 1 << 3,

    /// <summary>Stored compressed.</summary>
    Compressed = 1 << 4,
}

/// <summary>The status of the run that starts at the asked offset: one answer for <paramref name="Length"/> bytes.</summary>
/// <param name="Length">Bytes the answer holds for; never 0 for a non-empty question.</param>
/// <param name="Flags">What they are.</param>
/// <param name="HostOffset">Where they lie in <see cref="BlockNode.DataFileAt"/>, when <see cref="BlockFlags.OffsetValid"/> is set.</param>
public readonly record struct BlockStatus(long Length, BlockFlags Flags, long HostOffset = 0)
{
    public bool IsData => (Flags & BlockFlags.Data) != 0;

    public bool IsZero => (Flags & BlockFlags.Zero) != 0;

    public bool IsAllocated => (Flags & BlockFlags.Allocated) != 0;

    public bool HasOffset => (Flags & BlockFlags.OffsetValid) != 0;

    public bool IsCompressed => (Flags & BlockFlags.Compressed) != 0;
}

[Flags]
public enum WriteFlags
{
    None = 0,

    /// <summary>Stable on the medium when the request ends.</summary>
    ForceUnitAccess = 1 << 0,

    /// <summary>Store compressed, where the format can; whole clusters only.</summary>
    Compressed = 1 << 1,
}

[Flags]
public enum ZeroFlags
{
    None = 0,

    /// <summary>Space may be given back.</summary>
    MayUnmap = 1 << 0,

    ForceUnitAccess = 1 << 1,

    /// <summary>Fail with ENOTSUP rather than write zeros as data.</summary>
    NoFallback = 1 << 2,
}

/// <summary>How a grown area is prepared (qemu-img's preallocation modes).</summary>
public enum Preallocation
{
    Off,
    Metadata,
    Falloc,
    Full,
}

/// <summary>Cache modes, with QEMU's meaning.</summary>
public enum CacheMode
{
    /// <summary>The host's page cache; flushes reach the medium.</summary>
    Writeback,

    /// <summary>Past the host's page cache (O_DIRECT); flushes reach the medium.</summary>
    None,

    /// <summary>Page cache; each write reaches the medium before it ends.</summary>
    Writethrough,

    /// <summary>O_DIRECT, and each write reaches the medium before it ends.</summary>
    DirectSync,

    /// <summary>Page cache; flushes are ignored.</summary>
    Unsafe,
}
