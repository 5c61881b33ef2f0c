using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <summary>A folder cannot be shared: what and why.</summary>
public sealed class SharingException : Exception
{
    public SharingException()
    {
    }

    public SharingException(string message)
        : base(message)
    {
    }

    public SharingException(string message, Exception innerException)
        : base(message, innerException)
    {
    }
}

/// <summary>
/// A FUSE server over one folder (protocol 7.31, linux/fuse.h). The guest's kernel resolves paths and checks permissions; here each request touches one name in
/// one open folder, or one open file. Files that the guest makes belong to this process's user, or, where it is root, to the guest's caller. One thread.
/// </summary>
public sealed partial class FuseServer : IDisposable
{
    /// <summary>Bytes of one read or write at most.</summary>
    public const int MaximumTransfer = 256 << 10;

    /// <summary>Bytes of the longest request.</summary>
    public const int MaximumRequest = MaximumTransfer + 4096;

    /// <summary>Bytes of the longest answer.</summary>
    public const int MaximumReply = MaximumTransfer + 4096;

    private const int MaximumHandles = 16384;
    private const uint Major = 7;
    private const uint Minor = 31;
    private const ulong ValidSeconds = 1;
    private const int LongestName = 255;

    private const int NotPermitted = 1;
    private const int NoEntry = 2;
    private const int IoError = 5;
    private const int BadHandle = 9;
    private const int Exists = 17;
    private const int NotFolder = 20;
    private const int IsFolder = 21;
    private const int Invalid = 22;
    private const int TableFull = 23;
    private const int ReadOnlySystem = 30;
    private const int NameTooLong = 36;
    private const int NoSystemCall = 38;
    private const int NotSupported = 95;
    private const int Stale = 116;

    // Configuration
    private readonly bool _readOnly;
    private readonly bool _privileged;

    // State
    private readonly NodeTable _nodes;
    private readonly Dictionary<ulong, Handle> _handles = [];
    private readonly byte[] _entries = new byte[32 << 10];
    private ulong _nextHandle = 1;
    private bool _initialized;

    /// <summary>What the last <see cref="Answer"/> was about.</summary>
    private Node? _answered;

    /// <summary>A file or folder that the guest has open.</summary>
    /// <param name="Fd">Below zero where a saved state named what is not there any more.</param>
    /// <param name="Access">For reading, writing or both, as open(2) has it.</param>
    private sealed record Handle(int Fd, Node Node, int Access);

    /// <exception cref="SharingException">The folder cannot be opened.</exception>
    public FuseServer(string folder, bool readOnly)
    {
        _readOnly = readOnly;
        _privileged = ProcessIdentity.EffectiveUser == 0;
        const int currentFolder = -100;
        int fd = FileAt.Open(currentFolder, [.. System.Text.Encoding.UTF8.GetBytes(folder), 0], FileAt.OpenPath | FileAt.OpenDirectory);
        if (fd < 0 || FileAt.Stat(fd, out FileAttributes64 attributes) < 0)
            throw new SharingException($"cannot share '{folder}': {System.Runtime.InteropServices.Marshal.GetPInvokeErrorMessage(fd < 0 ? -fd : IoError)}");
        _nodes = new NodeTable(fd, attributes);
    }

    /// <summary>Files that the guest has open, and files that it knows; for tests and reports.</summary>
    public (int Handles, int Nodes) Held => (_handles.Count, _nodes.Count);

    /// <summary>Carries out one request.</summary>
    /// <param name="request">The whole message.</param>
    /// <param name="reply">Room for the answer.</param>
    /// <returns>The answer's length; 0 where the request has none.</returns>
    public int Serve(ReadOnlySpan<byte> request, Span<byte> reply)
    {
        if (request.Length < FuseHeader.Size)
            return 0;
        FuseHeader header = FuseHeader.Read(request);
        FuseReader arguments = new(request[FuseHeader.Size..]);
        switch (header.Operation)
        {
            case FuseOperation.Forget:
                _nodes.Forget(header.Node, arguments.U64());
                return 0;
            case FuseOperation.BatchForget:
                ForgetMany(ref arguments);
                return 0;
            case FuseOperation.Interrupt:
                // Requests are done one after the other: the one meant is over, or has not begun and will be short.
                return 0;
            default:
                break;
        }
        if (reply.Length < FuseWriter.HeaderSize)
            return 0;
        _nodes.Trim();
        FuseWriter writer = new(reply);
        int result = Carry(header, ref arguments, ref writer);
        if (result >= 0 && writer.Overflowed)
            result = -IoError;
        int length = result < 0 ? FuseWriter.HeaderSize : writer.Length;
        BinaryPrimitives.WriteInt32LittleEndian(reply, length);
        BinaryPrimitives.WriteInt32LittleEndian(reply[4..], Math.Min(result, 0));
        BinaryPrimitives.WriteUInt64LittleEndian(reply[8..], header.Unique);
        return length;
    }

    /// <summary>The guest's driver starts anew: nothing of before is held any more.</summary>
    public void Reset()
    {
        foreach (Handle handle in _handles.Values)
            Close(handle);
        _handles.Clear();
        _nodes.Clear();
        _initialized = false;
    }

    public void Dispose()
    {
        Reset();
        _nodes.Dispose();
    }

    private static void Close(Handle handle)
    {
        if (handle.Fd >= 0)
            _ = FileAt.Close(handle.Fd);
    }

    private int Carry(in FuseHeader header, ref FuseReader arguments, ref FuseWriter writer)
    {
        if (header.Operation == FuseOperation.Initialize)
            return Initialize(ref arguments, ref writer);
        if (!_initialized)
            return -IoError;
        if (header.Operation == FuseOperation.Destroy)
        {
            Reset();
            return 0;
        }
        if (_nodes.Find(header.Node) is not { } node)
            return header.Operation is FuseOperation.Release or FuseOperation.ReleaseFolder ? Release(ref arguments) : -Stale;
        return header.Operation switch
        {
            FuseOperation.Lookup => Lookup(node, ref arguments, ref writer),
            FuseOperation.GetAttributes => GetAttributes(node, ref arguments, ref writer),
            FuseOperation.SetAttributes => SetAttributes(node, ref arguments, ref writer),
            FuseOperation.ReadLink => ReadLink(node, ref writer),
            FuseOperation.SymbolicLink => MakeSymbolicLink(header, node, ref arguments, ref writer),
            FuseOperation.MakeNode => MakeNode(header, node, ref arguments, ref writer),
            FuseOperation.MakeFolder => MakeFolder(header, node, ref arguments, ref writer),
            FuseOperation.Unlink => Remove(node, ref arguments, isFolder: false),
            FuseOperation.RemoveFolder => Remove(node, ref arguments, isFolder: true),
            FuseOperation.Rename => Rename(node, ref arguments, withFlags: false),
            FuseOperation.Rename2 => Rename(node, ref arguments, withFlags: true),
            FuseOperation.Link => Link(node, ref arguments, ref writer),
            FuseOperation.Open => OpenFile(node, ref arguments, ref writer),
            FuseOperation.Create => Create(header, node, ref arguments, ref writer),
            FuseOperation.Read => Read(ref arguments, ref writer),
            FuseOperation.Write => Write(ref arguments, ref writer),
            FuseOperation.Flush => 0,
            FuseOperation.Release or FuseOperation.ReleaseFolder => Release(ref arguments),
            FuseOperation.Sync or FuseOperation.SyncFolder => Sync(ref arguments),
            FuseOperation.Allocate => Allocate(ref arguments),
            FuseOperation.Seek => Seek(ref arguments, ref writer),
            FuseOperation.OpenFolder => OpenFolder(node, ref writer),
            FuseOperation.ReadFolder => ReadFolder(ref arguments, ref writer),
            FuseOperation.FileSystemStatus => FileSystemStatus(node, ref writer),
            FuseOperation.SetExtended => SetExtended(node, ref arguments),
            FuseOperation.GetExtended => GetExtended(node, ref arguments, ref writer),
            FuseOperation.ListExtended => ListExtended(node, ref arguments, ref writer),
            FuseOperation.RemoveExtended => RemoveExtended(node, ref arguments),
            _ => -NoSystemCall,
        };
    }

    private int Initialize(ref FuseReader arguments, ref FuseWriter writer)
    {
        uint major = arguments.U32();
        uint minor = arguments.U32();
        uint readAhead = arguments.U32();
        FuseFeatures offered = (FuseFeatures)arguments.U32();
        if (arguments.IsShort || major < Major)
            return -Invalid;
        const uint maximumBackground = 16;
        const uint oldest = 27;
        if (major == Major && minor < oldest)
            return -Invalid;
        Reset();
        _initialized = true;
        FuseFeatures taken = offered & (FuseFeatures.AsyncRead | FuseFeatures.BigWrites | FuseFeatures.AutoInvalidateData | FuseFeatures.ParallelFolderOperations | FuseFeatures.MaximumPages);
        writer.U32(Major);
        writer.U32(Minor);
        writer.U32(Math.Min(readAhead, MaximumTransfer));
        writer.U32((uint)taken);
        writer.U32(maximumBackground | (maximumBackground * 3 / 4) << 16);
        writer.U32(MaximumTransfer);
        writer.U32(1);
        writer.U32(MaximumTransfer / 4096);
        writer.Zeros(32);
        return 0;
    }

    private void ForgetMany(ref FuseReader arguments)
    {
        uint count = arguments.U32();
        arguments.Skip(4);
        for (uint index = 0; index < count && !arguments.IsShort; index++)
            _nodes.Forget(arguments.U64(), arguments.U64());
    }

    private int Lookup(Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        ReadOnlySpan<byte> name = arguments.Text();
        int fault = CheckName(parent, name);
        return fault != 0 ? fault : Answer(parent, name, ref writer);
    }

    /// <summary>Tells the guest of a name: struct fuse_entry_out.</summary>
    private int Answer(Node parent, ReadOnlySpan<byte> name, ref FuseWriter writer)
    {
        int result = _nodes.Lookup(parent, name, out Node? node, out FileAttributes64 attributes);
        if (result < 0)
            return result;
        _answered = node;
        writer.U64(node!.Id);
        writer.U64(0);
        writer.U64(ValidSeconds);
        writer.U64(ValidSeconds);
        writer.U64(0);
        writer.Attributes(attributes);
        return 0;
    }

    private int GetAttributes(Node node, ref FuseReader arguments, ref FuseWriter writer)
    {
        const uint byHandle = 1;
        uint flags = arguments.U32();
        arguments.Skip(4);
        ulong handle = arguments.U64();
        int fd = (flags & byHandle) != 0 && _handles.TryGetValue(handle, out Handle? open) ? open.Fd : _nodes.Open(node);
        return AnswerAttributes(fd, ref writer);
    }

    private static int AnswerAttributes(int fd, ref FuseWriter writer)
    {
        if (fd < 0)
            return fd;
        int result = FileAt.Stat(fd, out FileAttributes64 attributes);
        if (result < 0)
            return result;
        writer.U64(ValidSeconds);
        writer.U64(0);
        writer.Attributes(attributes);
        return 0;
    }

    private int SetAttributes(Node node, ref FuseReader arguments, ref FuseWriter writer)
    {
        FuseSet valid = (FuseSet)arguments.U32();
        arguments.Skip(4);
        ulong handle = arguments.U64();
        ulong size = arguments.U64();
        arguments.Skip(8);
        ulong accessSeconds = arguments.U64();
        ulong modifySeconds = arguments.U64();
        arguments.Skip(8);
        uint accessNanoseconds = arguments.U32();
        uint modifyNanoseconds = arguments.U32();
        arguments.Skip(4);
        uint mode = arguments.U32();
        arguments.Skip(4);
        uint user = arguments.U32();
        uint group = arguments.U32();
        if (arguments.IsShort)
            return -Invalid;
        if (_readOnly)
            return -ReadOnlySystem;
        int fd = _nodes.Open(node);
        if (fd < 0)
            return fd;
        int result = 0;
        if (valid.HasFlag(FuseSet.Mode))
            result = node.Kind == FileAttributes64.SymbolicLink ? -NotSupported : FileAt.SetMode(fd, AllowedMode(mode));
        if (result >= 0 && (valid & (FuseSet.User | FuseSet.Group)) != 0)
            result = FileAt.SetOwner(fd, valid.HasFlag(FuseSet.User) ? user : uint.MaxValue, valid.HasFlag(FuseSet.Group) ? group : uint.MaxValue);
        if (result >= 0 && valid.HasFlag(FuseSet.Size))
            result = SetSize(node, fd, valid.HasFlag(FuseSet.Handle) ? handle : 0, size);
        if (result >= 0 && (valid & (FuseSet.AccessTime | FuseSet.ModifyTime)) != 0)
        {
            const uint second = 1_000_000_000;
            if (accessNanoseconds >= second || modifyNanoseconds >= second)
                return -Invalid;
            result = FileAt.SetTimes(
                fd,
                valid.HasFlag(FuseSet.AccessTime) ? ((long)accessSeconds, valid.HasFlag(FuseSet.AccessNow) ? -1 : accessNanoseconds) : null,
                valid.HasFlag(FuseSet.ModifyTime) ? ((long)modifySeconds, valid.HasFlag(FuseSet.ModifyNow) ? -1 : modifyNanoseconds) : null);
        }
        return result < 0 ? result : AnswerAttributes(fd, ref writer);
    }

    private int SetSize(Node node, int fd, ulong handle, ulong size)
    {
        if (size > long.MaxValue || node.Kind != FileAttributes64.Regular)
            return -Invalid;
        if (handle != 0 && _handles.TryGetValue(handle, out Handle? open) && open.Node == node)
        {
            int result = FileAt.Truncate(open.Fd, (long)size);
            if (result != -Invalid && result != -BadHandle)
                return result;
        }
        const int writeOnly = 1;
        int opened = FileAt.Reopen(fd, writeOnly | FileAt.OpenNonBlocking);
        if (opened < 0)
            return opened;
        int done = FileAt.Truncate(opened, (long)size);
        _ = FileAt.Close(opened);
        return done;
    }

    private int ReadLink(Node node, ref FuseWriter writer)
    {
        if (node.Kind != FileAttributes64.SymbolicLink)
            return -Invalid;
        int fd = _nodes.Open(node);
        if (fd < 0)
            return fd;
        int length = FileAt.ReadLink(fd, writer.Rest);
        if (length > 0)
            writer.Advance(length);
        return length;
    }

    private int FileSystemStatus(Node node, ref FuseWriter writer)
    {
        int fd = _nodes.Open(node);
        if (fd < 0)
            return fd;
        int result = FileAt.Space(fd, out FileSystemSpace space);
        if (result < 0)
            return result;
        writer.U64(space.Blocks);
        writer.U64(space.Free);
        writer.U64(space.Available);
        writer.U64(space.Files);
        writer.U64(space.FreeFiles);
        writer.U32(space.BlockSize);
        writer.U32(space.NameLength);
        writer.U32(space.FragmentSize);
        writer.Zeros(28);
        return 0;
    }

    /// <summary>One component, and nothing that leads elsewhere.</summary>
    private static int CheckName(Node parent, ReadOnlySpan<byte> name)
    {
        if (parent.Kind != FileAttributes64.Folder)
            return -NotFolder;
        if (name.Length < 2)
            return -NoEntry;
        ReadOnlySpan<byte> text = name[..^1];
        if (text.Length > LongestName)
            return -NameTooLong;
        return text.Contains((byte)'/') || text.SequenceEqual("."u8) || text.SequenceEqual(".."u8) ? -Invalid : 0;
    }

    /// <summary>Permission bits that a guest may set: as root, this process does not make programs that run as somebody else.</summary>
    private uint AllowedMode(uint mode) => mode & (_privileged ? 0x3ffu : 0xfffu);
}
