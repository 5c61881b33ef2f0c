using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Net.Security;
using System.Net.Sockets;
using System.Numerics;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using static Kvasir.Block.Nbd.NbdProtocol;

namespace Kvasir.Block.Nbd;

/// <summary>
/// An export of an NBD server: fixed newstyle negotiation, structured replies and the base:allocation context where the server has
/// them. Requests share one connection and may be answered in any order. A lost connection fails all requests.
/// </summary>
public sealed class NbdClient : BlockNode
{
    private readonly NbdAddress _address;
    private readonly Socket _socket;
    private readonly Stream _stream;
    private readonly SemaphoreSlim _send = new(1, 1);
    private readonly Lock _lock = new();
    private readonly Dictionary<ulong, Pending> _pending = [];
    private readonly bool _readOnly;

    // State
    private long _length;
    private ushort _flags;
    private bool _structured;
    private bool _hasStatus;
    private uint _contextId;
    private int _alignment = 1;
    private int _largest = LargestRequest;
    private ulong _nextCookie;
    private Task _receiver = Task.CompletedTask;
    private BlockException? _failure;

    private NbdClient(NbdAddress address, Socket socket, Stream stream, bool readOnly)
    {
        _address = address;
        _socket = socket;
        _stream = stream;
        _readOnly = readOnly;
    }

    public override string Driver => "nbd";

    public override string FileName => _address.ToString();

    public override long Length => _length;

    public override bool IsReadOnly => _readOnly || (_flags & NbdProtocol.ReadOnly) != 0;

    public override bool HasFastZero => (_flags & SendWriteZeroes) != 0;

    /// <summary>The smallest block that the server takes.</summary>
    public override int RequestAlignment => _alignment;

    /// <exception cref="BlockException">The server cannot be reached, or refuses the export.</exception>
    public static async ValueTask<NbdClient> ConnectAsync(NbdAddress address, bool readOnly, TlsCredentials? credentials = null, CancellationToken cancellation = default)
    {
        NbdHandshake handshake = await NbdHandshake.ConnectAsync(address, credentials, cancellation).ConfigureAwait(false);
        try
        {
            NbdClient client = new(address, handshake.Socket, handshake.Stream, readOnly);
            client._structured = (await handshake.AskAsync(OptStructuredReply, default, cancellation).ConfigureAwait(false)).Type == RepAck;
            if (client._structured)
                await client.AskContextAsync(handshake, cancellation).ConfigureAwait(false);
            await client.GoAsync(handshake, cancellation).ConfigureAwait(false);
            client._receiver = Task.Run(client.ReceiveAsync, CancellationToken.None);
            return client;
        }
        catch (IOException error)
        {
            await handshake.DisposeAsync().ConfigureAwait(false);
            throw NbdHandshake.Broken(address, error);
        }
        catch
        {
            await handshake.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if ((_flags & SendFlush) != 0 && !IsReadOnly)
            _ = await RequestAsync(CmdFlush, 0, 0, 0, default, default, cancellation).ConfigureAwait(false);
    }

    public override async ValueTask DisposeAsync()
    {
        if (_failure is null)
        {
            byte[] request = new byte[28];
            BinaryPrimitives.WriteUInt32BigEndian(request, RequestMagic);
            BinaryPrimitives.WriteUInt16BigEndian(request.AsSpan(6), CmdDisconnect);
            try
            {
                await _stream.WriteAsync(request).ConfigureAwait(false);
            }
            catch (IOException)
            {
                // The server left first, which is what was to be asked of it.
            }
        }
        await _stream.DisposeAsync().ConfigureAwait(false);
        await _receiver.ConfigureAwait(false);
        _send.Dispose();
        await base.DisposeAsync().ConfigureAwait(false);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            Memory<byte> part = buffer[..Math.Min(buffer.Length, _largest)];
            _ = await RequestAsync(CmdRead, 0, offset, part.Length, default, part, cancellation).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        bool fua = (flags & WriteFlags.ForceUnitAccess) != 0;
        ushort command = fua && (_flags & SendFua) != 0 ? CmdFlagFua : (ushort)0;
        while (!buffer.IsEmpty)
        {
            ReadOnlyMemory<byte> part = buffer[..Math.Min(buffer.Length, _largest)];
            _ = await RequestAsync(CmdWrite, command, offset, part.Length, part, default, cancellation).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
        if (fua && command == 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        if ((_flags & SendWriteZeroes) == 0)
        {
            await WriteZeroDataAsync(offset, length, flags, cancellation).ConfigureAwait(false);
            return;
        }
        ushort command = (flags & ZeroFlags.MayUnmap) != 0 ? (ushort)0 : CmdFlagNoHole;
        while (length > 0)
        {
            int part = (int)Math.Min(length, 1 << 30);
            _ = await RequestAsync(CmdWriteZeroes, command, offset, part, default, default, cancellation).ConfigureAwait(false);
            offset += part;
            length -= part;
        }
        if ((flags & ZeroFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        if ((_flags & SendTrim) == 0)
            return;
        while (length > 0)
        {
            int part = (int)Math.Min(length, 1 << 30);
            _ = await RequestAsync(CmdTrim, 0, offset, part, default, default, cancellation).ConfigureAwait(false);
            offset += part;
            length -= part;
        }
    }

    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        const BlockFlags data = BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid;
        if (!_hasStatus)
            return new BlockStatus(length, data, offset);
        Pending done = await RequestAsync(CmdBlockStatus, CmdFlagReqOne, offset, (int)Math.Min(length, 1 << 30), default, default, cancellation).ConfigureAwait(false);
        if (done.ExtentLength == 0)
            throw new BlockException($"{_address} answered a status request with nothing", BlockErrno.Io);
        BlockFlags flags = (done.ExtentFlags & StateHole) != 0 ? BlockFlags.None : BlockFlags.Data;
        if ((done.ExtentFlags & StateZero) != 0)
            flags = (flags & ~BlockFlags.Data) | BlockFlags.Zero;
        return new BlockStatus(Math.Min(done.ExtentLength, length), flags | BlockFlags.Allocated | BlockFlags.OffsetValid, offset);
    }

    private async ValueTask AskContextAsync(NbdHandshake handshake, CancellationToken cancellation)
    {
        byte[] context = Encoding.ASCII.GetBytes(BaseAllocation);
        (uint type, byte[] reply) = await handshake.AskAsync(OptSetMetaContext, NbdHandshake.ContextQuery(_address.Export, context), cancellation).ConfigureAwait(false);
        while (type == RepMetaContext)
        {
            if (reply.Length >= 4 && reply.AsSpan(4).SequenceEqual(context))
            {
                _contextId = BinaryPrimitives.ReadUInt32BigEndian(reply);
                _hasStatus = true;
            }
            (type, reply) = await handshake.ReadReplyAsync(OptSetMetaContext, cancellation).ConfigureAwait(false);
        }
    }

    private async ValueTask GoAsync(NbdHandshake handshake, CancellationToken cancellation)
    {
        (uint type, byte[] reply) = await handshake.AskAsync(OptGo, NbdHandshake.InfoQuery(_address.Export, InfoBlockSize), cancellation).ConfigureAwait(false);
        bool described = false;
        while (type == RepInfo)
        {
            if (reply.Length >= 12 && BinaryPrimitives.ReadUInt16BigEndian(reply) == InfoExport)
            {
                _length = BinaryPrimitives.ReadInt64BigEndian(reply.AsSpan(2));
                _flags = BinaryPrimitives.ReadUInt16BigEndian(reply.AsSpan(10));
                described = true;
            }
            else if (reply.Length >= 14 && BinaryPrimitives.ReadUInt16BigEndian(reply) == InfoBlockSize)
            {
                TakeBlockSizes(BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(2)), BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(10)));
            }
            (type, reply) = await handshake.ReadReplyAsync(OptGo, cancellation).ConfigureAwait(false);
        }
        if (type != RepAck || !described || _length < 0)
        {
            string reason = (type & RepErrorBit) != 0 ? Encoding.UTF8.GetString(reply) : "no description";
            throw new BlockException($"Requested export '{_address.Export}' not available: {reason}", BlockErrno.Invalid);
        }
        if ((_length & (_alignment - 1)) != 0)
            throw new BlockException($"Export length {_length} is not a multiple of its smallest block of {_alignment} bytes");
    }

    /// <summary>The sizes of requests that the server takes (NBD_INFO_BLOCK_SIZE): the smallest is a power of two, the largest a multiple of it.</summary>
    private void TakeBlockSizes(uint least, uint most)
    {
        if (least is 0 or > LargestAlignment || !BitOperations.IsPow2(least))
            throw new BlockException($"The NBD server's smallest block of {least} bytes is no power of two up to {LargestAlignment}");
        if (most < least || (most != uint.MaxValue && most % least != 0))
            throw new BlockException($"The NBD server's largest block of {most} bytes is not a multiple of its smallest, {least} bytes");
        _alignment = (int)least;
        _largest = (int)Math.Min(most, LargestRequest);
    }

    private async ValueTask<Pending> RequestAsync(
        ushort command, ushort flags, long offset, int length, ReadOnlyMemory<byte> payload, Memory<byte> target, CancellationToken cancellation)
    {
        Pending pending = new(command, offset, length, target);
        byte[] request = new byte[28];
        BinaryPrimitives.WriteUInt32BigEndian(request, RequestMagic);
        BinaryPrimitives.WriteUInt16BigEndian(request.AsSpan(4), flags);
        BinaryPrimitives.WriteUInt16BigEndian(request.AsSpan(6), command);
        BinaryPrimitives.WriteInt64BigEndian(request.AsSpan(16), offset);
        BinaryPrimitives.WriteInt32BigEndian(request.AsSpan(24), length);
        await _send.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            lock (_lock)
            {
                if (_failure is not null)
                    throw _failure;
                ulong cookie = _nextCookie++;
                _pending.Add(cookie, pending);
                BinaryPrimitives.WriteUInt64BigEndian(request.AsSpan(8), cookie);
            }
            // A request that is cut short would garble all that follow: from here on it is sent whole.
            await _stream.WriteAsync(request, CancellationToken.None).ConfigureAwait(false);
            if (!payload.IsEmpty)
                await _stream.WriteAsync(payload, CancellationToken.None).ConfigureAwait(false);
        }
        catch (Exception error) when (error is IOException or ObjectDisposedException)
        {
            HangUp();
        }
        finally
        {
            _send.Release();
        }
        await pending.Done.Task.ConfigureAwait(false);
        return pending;
    }

    /// <summary>Ends the connection from the sending side. The receiver, which may be filling a request's memory, sees the end and fails what is under way.</summary>
    private void HangUp()
    {
        try
        {
            _socket.Shutdown(SocketShutdown.Both);
        }
        catch (Exception error) when (error is SocketException or ObjectDisposedException)
        {
            // It is closed already, and the receiver has seen it or is about to.
        }
    }

    /// <summary>Fails all requests. For the receiver alone: nothing may be writing into their memory any more.</summary>
    private void Fail(string reason)
    {
        List<Pending> all;
        lock (_lock)
        {
            _failure ??= new BlockException($"Lost the connection to {_address}: {reason}", BlockErrno.Io);
            all = [.. _pending.Values];
            _pending.Clear();
        }
        foreach (Pending pending in all)
            pending.Done.TrySetException(_failure);
    }

    private async Task ReceiveAsync()
    {
        byte[] head = new byte[20];
        try
        {
            while (true)
            {
                await _stream.ReadExactlyAsync(head.AsMemory(0, 16)).ConfigureAwait(false);
                uint magic = BinaryPrimitives.ReadUInt32BigEndian(head);
                if (magic == SimpleReplyMagic)
                {
                    await OnSimpleReplyAsync(BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(4)), BinaryPrimitives.ReadUInt64BigEndian(head.AsSpan(8))).ConfigureAwait(false);
                }
                else if (magic == StructuredReplyMagic && _structured)
                {
                    await _stream.ReadExactlyAsync(head.AsMemory(16, 4)).ConfigureAwait(false);
                    await OnChunkAsync(head).ConfigureAwait(false);
                }
                else
                {
                    throw new BlockException("a reply has a wrong magic number", BlockErrno.Io);
                }
            }
        }
        catch (Exception error)
        {
            // Whatever it was: nobody reads replies any more, so whoever waits for one is told.
            Fail(error.Message);
            if (error is not (IOException or ObjectDisposedException or BlockException))
                throw;
        }
    }

    private async ValueTask OnSimpleReplyAsync(uint error, ulong cookie)
    {
        Pending pending = Find(cookie);
        if (error == 0 && !pending.Target.IsEmpty)
            await _stream.ReadExactlyAsync(pending.Part(pending.Offset, (uint)pending.Target.Length)).ConfigureAwait(false);
        Finish(cookie, pending, error);
    }

    private async ValueTask OnChunkAsync(byte[] head)
    {
        ushort flags = BinaryPrimitives.ReadUInt16BigEndian(head.AsSpan(4));
        ushort type = BinaryPrimitives.ReadUInt16BigEndian(head.AsSpan(6));
        uint length = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(16));
        ulong cookie = BinaryPrimitives.ReadUInt64BigEndian(head.AsSpan(8));
        Pending pending = Find(cookie);
        if (type == ChunkOffsetData)
        {
            if (length < 8)
                throw new BlockException("a data chunk is too short", BlockErrno.Io);
            byte[] place = new byte[8];
            await _stream.ReadExactlyAsync(place).ConfigureAwait(false);
            Memory<byte> target = pending.Part(BinaryPrimitives.ReadInt64BigEndian(place), length - 8);
            await _stream.ReadExactlyAsync(target).ConfigureAwait(false);
        }
        else
        {
            if (length > LargestOption)
                throw new BlockException("a reply chunk is too long", BlockErrno.Io);
            byte[] data = new byte[length];
            await _stream.ReadExactlyAsync(data).ConfigureAwait(false);
            OnSmallChunk(pending, type, data);
        }
        if ((flags & ChunkDone) != 0)
            Finish(cookie, pending, pending.Error);
    }

    private void OnSmallChunk(Pending pending, ushort type, ReadOnlySpan<byte> data)
    {
        switch (type)
        {
            case ChunkNone:
                break;
            case ChunkOffsetHole when data.Length == 12:
                pending.Part(BinaryPrimitives.ReadInt64BigEndian(data), BinaryPrimitives.ReadUInt32BigEndian(data[8..])).Span.Clear();
                break;
            case ChunkBlockStatus when data.Length >= 12 && BinaryPrimitives.ReadUInt32BigEndian(data) == _contextId:
                pending.ExtentLength = BinaryPrimitives.ReadUInt32BigEndian(data[4..]);
                pending.ExtentFlags = BinaryPrimitives.ReadUInt32BigEndian(data[8..]);
                break;
            case >= 1 << 15 when data.Length >= 4:
                pending.Error = Math.Max(1, BinaryPrimitives.ReadUInt32BigEndian(data));
                break;
            default:
                throw new BlockException($"an unexpected reply chunk of type {type}", BlockErrno.Io);
        }
    }

    private Pending Find(ulong cookie)
    {
        lock (_lock)
            return _pending.TryGetValue(cookie, out Pending? pending) ? pending : throw new BlockException("a reply belongs to no request", BlockErrno.Io);
    }

    /// <summary>Ends a request whose answer has come in whole: until then it is among those that a lost connection fails.</summary>
    private void Finish(ulong cookie, Pending pending, uint error)
    {
        lock (_lock)
            _pending.Remove(cookie);
        pending.Finish(error, _address);
    }

    private sealed class Pending(ushort command, long offset, int length, Memory<byte> target)
    {
        private long _received;
        private bool _scattered;

        public TaskCompletionSource Done { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

        public Memory<byte> Target => target;

        public long Offset => offset;

        public uint Error { get; set; }

        public uint ExtentLength { get; set; }

        public uint ExtentFlags { get; set; }

        /// <summary>The place of a part of the answer. What the parts leave out is never taken for data, in whichever order they come.</summary>
        public Memory<byte> Part(long at, uint size)
        {
            if (command != CmdRead || at < offset || size > target.Length || at - offset > target.Length - size)
                throw new BlockException("a data chunk lies outside its request", BlockErrno.Io);
            if (!_scattered && at - offset != _received)
            {
                target.Span[(int)_received..].Clear();
                _scattered = true;
            }
            _received += size;
            if (_received > target.Length)
                throw new BlockException("a read was answered with more than it asked for", BlockErrno.Io);
            return target.Slice((int)(at - offset), (int)size);
        }

        public void Finish(uint error, NbdAddress address)
        {
            if (error == 0 && command == CmdRead && _received != length)
                Done.TrySetException(new BlockException($"{address} answered a read of {length} bytes with {_received}", BlockErrno.Io));
            else if (error == 0)
                Done.TrySetResult();
            else
                Done.TrySetException(BlockException.FromErrno($"{address} failed a request", (int)Math.Min(error, 4095)));
        }
    }
}
