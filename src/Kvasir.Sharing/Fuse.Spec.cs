using System;
using System.Buffers.Binary;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <summary>Operations of the FUSE protocol (linux/fuse.h, version 7.31).</summary>
internal enum FuseOperation : uint
{
    Lookup = 1,
    Forget = 2,
    GetAttributes = 3,
    SetAttributes = 4,
    ReadLink = 5,
    SymbolicLink = 6,
    MakeNode = 8,
    MakeFolder = 9,
    Unlink = 10,
    RemoveFolder = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    FileSystemStatus = 17,
    Release = 18,
    Sync = 20,
    SetExtended = 21,
    GetExtended = 22,
    ListExtended = 23,
    RemoveExtended = 24,
    Flush = 25,
    Initialize = 26,
    OpenFolder = 27,
    ReadFolder = 28,
    ReleaseFolder = 29,
    SyncFolder = 30,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Allocate = 43,
    Rename2 = 45,
    Seek = 46,
}

/// <summary>Flags of INIT.</summary>
[Flags]
internal enum FuseFeatures : uint
{
    None = 0,
    AsyncRead = 1 << 0,
    BigWrites = 1 << 5,
    AutoInvalidateData = 1 << 12,
    ParallelFolderOperations = 1 << 18,
    MaximumPages = 1 << 22,
}

/// <summary>Which attributes SETATTR sets.</summary>
[Flags]
internal enum FuseSet : uint
{
    None = 0,
    Mode = 1 << 0,
    User = 1 << 1,
    Group = 1 << 2,
    Size = 1 << 3,
    AccessTime = 1 << 4,
    ModifyTime = 1 << 5,
    Handle = 1 << 6,
    AccessNow = 1 << 7,
    ModifyNow = 1 << 8,
}

/// <summary>struct fuse_in_header.</summary>
internal readonly record struct FuseHeader(uint Length, FuseOperation Operation, ulong Unique, ulong Node, uint User, uint Group)
{
    public const int Size = 40;

    public static FuseHeader Read(ReadOnlySpan<byte> bytes) => new(
        BinaryPrimitives.ReadUInt32LittleEndian(bytes),
        (FuseOperation)BinaryPrimitives.ReadUInt32LittleEndian(bytes[4..]),
        BinaryPrimitives.ReadUInt64LittleEndian(bytes[8..]),
        BinaryPrimitives.ReadUInt64LittleEndian(bytes[16..]),
        BinaryPrimitives.ReadUInt32LittleEndian(bytes[24..]),
        BinaryPrimitives.ReadUInt32LittleEndian(bytes[28..]));
}

/// <summary>Takes a request's arguments one after the other. What is not there reads as zero, and <see cref="IsShort"/> says so.</summary>
internal ref struct FuseReader(ReadOnlySpan<byte> bytes)
{
    private ReadOnlySpan<byte> _rest = bytes;

    public bool IsShort { get; private set; }

    public readonly ReadOnlySpan<byte> Rest => _rest;

    public uint U32()
    {
        ReadOnlySpan<byte> taken = Bytes(4);
        return taken.IsEmpty ? 0 : BinaryPrimitives.ReadUInt32LittleEndian(taken);
    }

    public ulong U64()
    {
        ReadOnlySpan<byte> taken = Bytes(8);
        return taken.IsEmpty ? 0 : BinaryPrimitives.ReadUInt64LittleEndian(taken);
    }

    public void Skip(int count) => Bytes(count);

    public ReadOnlySpan<byte> Bytes(int count)
    {
        if (_rest.Length < count)
        {
            IsShort = true;
            _rest = default;
            return default;
        }
        ReadOnlySpan<byte> taken = _rest[..count];
        _rest = _rest[count..];
        return taken;
    }

    /// <summary>A string with its final zero.</summary>
    public ReadOnlySpan<byte> Text()
    {
        int end = _rest.IndexOf((byte)0);
        return end < 0 ? Bytes(int.MaxValue) : Bytes(end + 1);
    }
}

/// <summary>Builds an answer behind the place of its header. What does not fit makes it invalid.</summary>
internal ref struct FuseWriter(Span<byte> bytes)
{
    public const int HeaderSize = 16;

    private readonly Span<byte> _bytes = bytes;
    private int _at = HeaderSize;

    public bool Overflowed { get; private set; }

    public readonly int Length => _at;

    /// <summary>The room that is left.</summary>
    public readonly Span<byte> Rest => _at < _bytes.Length ? _bytes[_at..] : default;

    public void Advance(int count) => _at += count;

    public void U32(uint value)
    {
        Span<byte> place = Take(4);
        if (!place.IsEmpty)
            BinaryPrimitives.WriteUInt32LittleEndian(place, value);
    }

    public void U64(ulong value)
    {
        Span<byte> place = Take(8);
        if (!place.IsEmpty)
            BinaryPrimitives.WriteUInt64LittleEndian(place, value);
    }

    public void Zeros(int count) => Take(count).Clear();

    public void Bytes(ReadOnlySpan<byte> bytes)
    {
        Span<byte> place = Take(bytes.Length);
        if (place.Length == bytes.Length)
            bytes.CopyTo(place);
    }

    /// <summary>struct fuse_attr.</summary>
    public void Attributes(in FileAttributes64 attributes)
    {
        U64(attributes.Inode);
        U64((ulong)attributes.Size);
        U64((ulong)attributes.Blocks);
        U64((ulong)attributes.AccessSeconds);
        U64((ulong)attributes.ModifySeconds);
        U64((ulong)attributes.ChangeSeconds);
        U32(attributes.AccessNanoseconds);
        U32(attributes.ModifyNanoseconds);
        U32(attributes.ChangeNanoseconds);
        U32(attributes.Mode);
        U32(attributes.Links);
        U32(attributes.User);
        U32(attributes.Group);
        U32((uint)attributes.SpecialDevice);
        U32((uint)attributes.BlockSize);
        U32(0);
    }

    private Span<byte> Take(int count)
    {
        if (count > _bytes.Length - _at)
        {
            Overflowed = true;
            return default;
        }
        Span<byte> taken = _bytes.Slice(_at, count);
        _at += count;
        return taken;
    }
}
