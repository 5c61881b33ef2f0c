using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;
using static Kvasir.Block.Nbd.NbdProtocol;

namespace Kvasir.Block.Nbd;

/// <summary>One client of an <see cref="NbdServer"/>: the negotiation, then requests, several at a time.</summary>
internal sealed class NbdConnection(NbdServer server, Stream stream) : IAsyncDisposable
{
    private const int RequestsAtOnce = 16;

    // Of one context in one answer, and steps to find them: bounds for what a single request costs.
    private const int MostExtents = 512;
    private const int MostSteps = 2048;

    private readonly SemaphoreSlim _send = new(1, 1);
    private readonly SemaphoreSlim _slots = new(RequestsAtOnce, RequestsAtOnce);
    private Stream _stream = stream;
    private bool _structured;
    private NbdExport? _contextsOf;
    private List<(uint Id, NbdContext Context)> _contexts = [];
    private bool _secure;
    private bool _noZeroes;

    public async ValueTask DisposeAsync()
    {
        // A client over TLS is told that this is the end.
        await _stream.DisposeAsync().ConfigureAwait(false);
        _send.Dispose();
        _slots.Dispose();
    }

    public async Task RunAsync(CancellationToken cancellation)
    {
        NbdExport? export;
        using (CancellationTokenSource limited = CancellationTokenSource.CreateLinkedTokenSource(cancellation))
        {
            limited.CancelAfter(server.NegotiationLimit);
            export = await GreetAsync(limited.Token).ConfigureAwait(false);
        }
        if (export is null)
            return;
        // What was chosen for one export says nothing of another.
        if (!ReferenceEquals(export, _contextsOf))
            _contexts = [];
        await ServeAsync(export, cancellation).ConfigureAwait(false);
    }

    private async ValueTask<NbdExport?> GreetAsync(CancellationToken cancellation)
    {
        byte[] greeting = new byte[18];
        BinaryPrimitives.WriteUInt64BigEndian(greeting, InitMagic);
        BinaryPrimitives.WriteUInt64BigEndian(greeting.AsSpan(8), OptionMagic);
        BinaryPrimitives.WriteUInt16BigEndian(greeting.AsSpan(16), FlagFixedNewstyle | FlagNoZeroes);
        await _stream.WriteAsync(greeting, cancellation).ConfigureAwait(false);
        byte[] flags = new byte[4];
        await _stream.ReadExactlyAsync(flags, cancellation).ConfigureAwait(false);
        _noZeroes = (BinaryPrimitives.ReadUInt32BigEndian(flags) & FlagNoZeroes) != 0;
        return await NegotiateAsync(cancellation).ConfigureAwait(false);
    }

    private async ValueTask<NbdExport?> NegotiateAsync(CancellationToken cancellation)
    {
        byte[] head = new byte[16];
        while (true)
        {
            await _stream.ReadExactlyAsync(head, cancellation).ConfigureAwait(false);
            uint option = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(8));
            uint length = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(12));
            if (BinaryPrimitives.ReadUInt64BigEndian(head) != OptionMagic || length > LargestOption)
                throw new BlockException("the client broke the protocol");
            byte[] data = new byte[length];
            await _stream.ReadExactlyAsync(data, cancellation).ConfigureAwait(false);
            if (server.RequiresTls && !_secure && option is not (OptStartTls or OptAbort))
            {
                await ReplyAsync(option, RepErrTlsRequired, "TLS is required"u8.ToArray(), cancellation).ConfigureAwait(false);
                if (option == OptExportName)
                    return null;
                continue;
            }
            switch (option)
            {
                case OptExportName:
                    return await OnExportNameAsync(data, cancellation).ConfigureAwait(false);
                case OptAbort:
                    await ReplyAsync(option, RepAck, default, cancellation).ConfigureAwait(false);
                    return null;
                case OptList:
                    await OnListAsync(cancellation).ConfigureAwait(false);
                    break;
                case OptStartTls when server.RequiresTls && !_secure:
                    await ReplyAsync(option, RepAck, default, cancellation).ConfigureAwait(false);
                    _stream = await server.SecureAsync(_stream, cancellation).ConfigureAwait(false);
                    _secure = true;
                    _structured = false;
                    _contexts = [];
                    break;
                case OptStructuredReply:
                    _structured = true;
                    await ReplyAsync(option, RepAck, default, cancellation).ConfigureAwait(false);
                    break;
                case OptListMetaContext or OptSetMetaContext:
                    await OnMetaContextAsync(option, data, cancellation).ConfigureAwait(false);
                    break;
                case OptInfo or OptGo:
                    if (await OnGoAsync(option, data, cancellation).ConfigureAwait(false) is NbdExport export && option == OptGo)
                        return export;
                    break;
                default:
                    await ReplyAsync(option, RepErrUnsupported, default, cancellation).ConfigureAwait(false);
                    break;
            }
        }
    }

    private static ushort FlagsOf(NbdExport export)
    {
        ushort flags = HasFlags | SendDf | CanMultiConn | SendCache;
        return export.ReadOnly || export.Node.IsReadOnly
            ? (ushort)(flags | NbdProtocol.ReadOnly)
            : (ushort)(flags | SendFlush | SendFua | SendTrim | SendWriteZeroes);
    }

    private async ValueTask<NbdExport> OnExportNameAsync(byte[] data, CancellationToken cancellation)
    {
        NbdExport export = server.Find(Encoding.UTF8.GetString(data)) ?? throw new BlockException("no such export");
        byte[] reply = new byte[_noZeroes ? 10 : 134];
        BinaryPrimitives.WriteInt64BigEndian(reply, export.Node.Length);
        BinaryPrimitives.WriteUInt16BigEndian(reply.AsSpan(8), FlagsOf(export));
        await _stream.WriteAsync(reply, cancellation).ConfigureAwait(false);
        return export;
    }

    private async ValueTask OnListAsync(CancellationToken cancellation)
    {
        foreach (NbdExport export in server.Exports)
        {
            byte[] text = Encoding.UTF8.GetBytes(export.Name);
            byte[] item = new byte[4 + text.Length + Encoding.UTF8.GetByteCount(export.Description ?? string.Empty)];
            BinaryPrimitives.WriteInt32BigEndian(item, text.Length);
            text.CopyTo(item, 4);
            Encoding.UTF8.GetBytes(export.Description ?? string.Empty, item.AsSpan(4 + text.Length));
            await ReplyAsync(OptList, RepServer, item, cancellation).ConfigureAwait(false);
        }
        await ReplyAsync(OptList, RepAck, default, cancellation).ConfigureAwait(false);
    }

    private async ValueTask OnMetaContextAsync(uint option, byte[] data, CancellationToken cancellation)
    {
        if (!_structured || data.Length < 8 || NameIn(data) is not string name || data.Length < 8 + Encoding.UTF8.GetByteCount(name))
        {
            await ReplyAsync(option, RepErrInvalid, default, cancellation).ConfigureAwait(false);
            return;
        }
        if (server.Find(name) is not NbdExport export)
        {
            await ReplyAsync(option, RepErrUnknown, default, cancellation).ConfigureAwait(false);
            return;
        }
        int at = 4 + Encoding.UTF8.GetByteCount(name);
        uint queries = BinaryPrimitives.ReadUInt32BigEndian(data.AsSpan(at));
        at += 4;
        NbdContext[] offered = [new NbdAllocationContext(export.Node), .. export.Contexts];
        bool[] wanted = new bool[offered.Length];
        bool lists = option == OptListMetaContext;
        wanted.AsSpan().Fill(queries == 0 && lists);
        for (uint i = 0; i < queries; i++)
        {
            if (at + 4 > data.Length || BinaryPrimitives.ReadUInt32BigEndian(data.AsSpan(at)) is uint size && size > data.Length - at - 4)
            {
                await ReplyAsync(option, RepErrInvalid, default, cancellation).ConfigureAwait(false);
                return;
            }
            int length = BinaryPrimitives.ReadInt32BigEndian(data.AsSpan(at));
            string query = Encoding.UTF8.GetString(data, at + 4, length);
            for (int k = 0; k < offered.Length; k++)
                wanted[k] |= query == offered[k].Name || (lists && query.EndsWith(':') && offered[k].Name.StartsWith(query, StringComparison.Ordinal));
            at += 4 + length;
        }
        if (!lists)
        {
            _contexts = [];
            _contextsOf = export;
        }
        for (int k = 0; k < offered.Length; k++)
        {
            if (!wanted[k])
                continue;
            uint id = lists ? 0 : (uint)k + 1;
            if (!lists)
                _contexts.Add((id, offered[k]));
            byte[] reply = new byte[4 + Encoding.UTF8.GetByteCount(offered[k].Name)];
            BinaryPrimitives.WriteUInt32BigEndian(reply, id);
            Encoding.UTF8.GetBytes(offered[k].Name, reply.AsSpan(4));
            await ReplyAsync(option, RepMetaContext, reply, cancellation).ConfigureAwait(false);
        }
        await ReplyAsync(option, RepAck, default, cancellation).ConfigureAwait(false);
    }

    private async ValueTask<NbdExport?> OnGoAsync(uint option, byte[] data, CancellationToken cancellation)
    {
        if (NameIn(data) is not string name)
        {
            await ReplyAsync(option, RepErrInvalid, default, cancellation).ConfigureAwait(false);
            return null;
        }
        if (server.Find(name) is not NbdExport export)
        {
            await ReplyAsync(option, RepErrUnknown, Encoding.UTF8.GetBytes($"export '{name}' not present"), cancellation).ConfigureAwait(false);
            return null;
        }
        byte[] info = new byte[12];
        BinaryPrimitives.WriteUInt16BigEndian(info, InfoExport);
        BinaryPrimitives.WriteInt64BigEndian(info.AsSpan(2), export.Node.Length);
        BinaryPrimitives.WriteUInt16BigEndian(info.AsSpan(10), FlagsOf(export));
        await ReplyAsync(option, RepInfo, info, cancellation).ConfigureAwait(false);
        byte[] sizes = new byte[14];
        BinaryPrimitives.WriteUInt16BigEndian(sizes, InfoBlockSize);
        BinaryPrimitives.WriteInt32BigEndian(sizes.AsSpan(2), 1);
        BinaryPrimitives.WriteInt32BigEndian(sizes.AsSpan(6), 4096);
        BinaryPrimitives.WriteInt32BigEndian(sizes.AsSpan(10), LargestRequest);
        await ReplyAsync(option, RepInfo, sizes, cancellation).ConfigureAwait(false);
        if (export.Description is string description)
        {
            byte[] text = new byte[2 + Encoding.UTF8.GetByteCount(description)];
            BinaryPrimitives.WriteUInt16BigEndian(text, InfoDescription);
            Encoding.UTF8.GetBytes(description, text.AsSpan(2));
            await ReplyAsync(option, RepInfo, text, cancellation).ConfigureAwait(false);
        }
        await ReplyAsync(option, RepAck, default, cancellation).ConfigureAwait(false);
        return export;
    }

    private static string? NameIn(byte[] data)
    {
        if (data.Length < 4)
            return null;
        uint length = BinaryPrimitives.ReadUInt32BigEndian(data);
        return length > data.Length - 4 || length > 4096 ? null : Encoding.UTF8.GetString(data, 4, (int)length);
    }

    private async ValueTask ReplyAsync(uint option, uint type, ReadOnlyMemory<byte> data, CancellationToken cancellation)
    {
        byte[] reply = new byte[20 + data.Length];
        BinaryPrimitives.WriteUInt64BigEndian(reply, ReplyMagic);
        BinaryPrimitives.WriteUInt32BigEndian(reply.AsSpan(8), option);
        BinaryPrimitives.WriteUInt32BigEndian(reply.AsSpan(12), type);
        BinaryPrimitives.WriteInt32BigEndian(reply.AsSpan(16), data.Length);
        data.CopyTo(reply.AsMemory(20));
        await _stream.WriteAsync(reply, cancellation).ConfigureAwait(false);
    }

    private async ValueTask ServeAsync(NbdExport export, CancellationToken cancellation)
    {
        byte[] head = new byte[28];
        try
        {
            while (true)
            {
                await _stream.ReadExactlyAsync(head, cancellation).ConfigureAwait(false);
                Request request = new(
                    BinaryPrimitives.ReadUInt16BigEndian(head.AsSpan(6)), BinaryPrimitives.ReadUInt16BigEndian(head.AsSpan(4)), BinaryPrimitives.ReadUInt64BigEndian(head.AsSpan(8)),
                    BinaryPrimitives.ReadInt64BigEndian(head.AsSpan(16)), BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(24)));
                if (BinaryPrimitives.ReadUInt32BigEndian(head) != RequestMagic || (request.Command is CmdRead or CmdWrite && request.Length > LargestRequest))
                    throw new BlockException("the client broke the protocol");
                if (request.Command == CmdDisconnect)
                    return;
                await _slots.WaitAsync(cancellation).ConfigureAwait(false);
                _ = HandleAsync(export, request, await TakeBufferAsync(request, cancellation).ConfigureAwait(false), cancellation);
            }
        }
        finally
        {
            // Requests under way hold buffers and the disk: they end before the connection does.
            for (int i = 0; i < RequestsAtOnce; i++)
                await _slots.WaitAsync(CancellationToken.None).ConfigureAwait(false);
        }
    }

    /// <summary>The memory for a request's data, with what is to be written. Where the client breaks off, the request's slot is free again.</summary>
    private async ValueTask<AlignedBuffer?> TakeBufferAsync(Request request, CancellationToken cancellation)
    {
        AlignedBuffer? buffer = null;
        try
        {
            if (request.Command is CmdRead or CmdWrite)
                buffer = AlignedBuffer.Rent((int)Math.Max(request.Length, 1));
            if (request.Command == CmdWrite)
                await _stream.ReadExactlyAsync(buffer!.Memory[..(int)request.Length], cancellation).ConfigureAwait(false);
            return buffer;
        }
        catch
        {
            buffer?.Dispose();
            _slots.Release();
            throw;
        }
    }

    private async Task HandleAsync(NbdExport export, Request request, AlignedBuffer? buffer, CancellationToken cancellation)
    {
        try
        {
            uint error = 0;
            byte[]? status = null;
            try
            {
                status = await ExecuteAsync(export, request, buffer, cancellation).ConfigureAwait(false);
            }
            catch (BlockException failure)
            {
                error = WireError(failure.Errno);
            }
            await AnswerAsync(request, error, status, buffer, cancellation).ConfigureAwait(false);
        }
        catch (Exception failure) when (failure is IOException or OperationCanceledException or ObjectDisposedException)
        {
            // The connection is gone, and its reader is about to see that as well.
        }
        finally
        {
            buffer?.Dispose();
            _slots.Release();
        }
    }

    private async ValueTask<byte[]?> ExecuteAsync(NbdExport export, Request request, AlignedBuffer? buffer, CancellationToken cancellation)
    {
        BlockNode node = export.Node;
        bool writes = request.Command is CmdWrite or CmdTrim or CmdWriteZeroes;
        if (writes && (export.ReadOnly || node.IsReadOnly))
            throw new BlockException("the export is read-only", BlockErrno.Perm);
        if (request.Command != CmdFlush && (request.Offset < 0 || request.Length > node.Length || request.Offset > node.Length - request.Length))
            throw new BlockException("request outside the export", writes ? BlockErrno.NoSpace : BlockErrno.Invalid);
        bool fua = (request.Flags & CmdFlagFua) != 0;
        switch (request.Command)
        {
            case CmdRead:
                await node.ReadAsync(request.Offset, buffer!.Memory[..(int)request.Length], cancellation).ConfigureAwait(false);
                break;
            case CmdWrite:
                await node.WriteAsync(request.Offset, buffer!.Memory[..(int)request.Length], fua ? WriteFlags.ForceUnitAccess : WriteFlags.None, cancellation).ConfigureAwait(false);
                break;
            case CmdFlush:
                await node.FlushAsync(cancellation).ConfigureAwait(false);
                break;
            case CmdTrim:
                await node.DiscardAsync(request.Offset, request.Length, cancellation).ConfigureAwait(false);
                if (fua)
                    await node.FlushAsync(cancellation).ConfigureAwait(false);
                break;
            case CmdWriteZeroes:
                ZeroFlags zero = ((request.Flags & CmdFlagNoHole) == 0 ? ZeroFlags.MayUnmap : ZeroFlags.None) | (fua ? ZeroFlags.ForceUnitAccess : ZeroFlags.None);
                await node.WriteZeroesAsync(request.Offset, request.Length, zero, cancellation).ConfigureAwait(false);
                break;
            case CmdCache:
                break;
            case CmdBlockStatus when _contexts.Count > 0 && request.Length > 0:
                return await StatusAsync(export, request, cancellation).ConfigureAwait(false);
            default:
                throw new BlockException("unknown command", BlockErrno.Invalid);
        }
        return null;
    }

    /// <summary>The answer to a status request: a chunk for each context, with runs from the request's start on, as many as are found soon.</summary>
    private async ValueTask<byte[]> StatusAsync(NbdExport export, Request request, CancellationToken cancellation)
    {
        using MemoryStream answer = new();
        List<(uint Length, uint State)> extents = [];
        for (int i = 0; i < _contexts.Count; i++)
        {
            (uint id, NbdContext context) = _contexts[i];
            extents.Clear();
            long shift = context is NbdAllocationContext ? 0 : export.ContextOffset;
            long done = 0;
            for (int steps = 0; done < request.Length && steps < MostSteps; steps++)
            {
                (long length, uint state) = await context.AtAsync(request.Offset + shift + done, request.Length - done, cancellation).ConfigureAwait(false);
                if (length <= 0)
                    break;
                if (extents.Count > 0 && extents[^1].State == state)
                    extents[^1] = (extents[^1].Length + (uint)length, state);
                else if (extents.Count == ((request.Flags & CmdFlagReqOne) != 0 ? 1 : MostExtents))
                    break;
                else
                    extents.Add(((uint)length, state));
                done += length;
            }
            if (extents.Count == 0)
                throw new BlockException("nothing is known of the range", BlockErrno.Io);
            byte[] chunk = Chunk(request, ChunkBlockStatus, 4 + (8 * extents.Count), last: i == _contexts.Count - 1);
            BinaryPrimitives.WriteUInt32BigEndian(chunk.AsSpan(20), id);
            for (int k = 0; k < extents.Count; k++)
            {
                BinaryPrimitives.WriteUInt32BigEndian(chunk.AsSpan(24 + (8 * k)), extents[k].Length);
                BinaryPrimitives.WriteUInt32BigEndian(chunk.AsSpan(28 + (8 * k)), extents[k].State);
            }
            answer.Write(chunk);
        }
        return answer.ToArray();
    }

    private async ValueTask AnswerAsync(Request request, uint error, byte[]? status, AlignedBuffer? buffer, CancellationToken cancellation)
    {
        bool data = request.Command == CmdRead && error == 0;
        byte[] head;
        if (!_structured || (request.Command is not (CmdRead or CmdBlockStatus)))
        {
            head = new byte[16];
            BinaryPrimitives.WriteUInt32BigEndian(head, SimpleReplyMagic);
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(4), error);
            BinaryPrimitives.WriteUInt64BigEndian(head.AsSpan(8), request.Cookie);
        }
        else if (error != 0)
        {
            head = Chunk(request, ChunkError, 6);
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(20), error);
        }
        else if (data)
        {
            head = Chunk(request, ChunkOffsetData, 8, (int)request.Length);
            BinaryPrimitives.WriteInt64BigEndian(head.AsSpan(20), request.Offset);
        }
        else
        {
            head = status!;
        }
        await _send.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            await _stream.WriteAsync(head, cancellation).ConfigureAwait(false);
            if (data)
                await _stream.WriteAsync(buffer!.Memory[..(int)request.Length], cancellation).ConfigureAwait(false);
        }
        finally
        {
            _send.Release();
        }
    }

    private static byte[] Chunk(Request request, ushort type, int length, int following = 0, bool last = true)
    {
        byte[] head = new byte[20 + length];
        BinaryPrimitives.WriteUInt32BigEndian(head, StructuredReplyMagic);
        BinaryPrimitives.WriteUInt16BigEndian(head.AsSpan(4), last ? ChunkDone : (ushort)0);
        BinaryPrimitives.WriteUInt16BigEndian(head.AsSpan(6), type);
        BinaryPrimitives.WriteUInt64BigEndian(head.AsSpan(8), request.Cookie);
        BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(16), length + following);
        return head;
    }

    private readonly record struct Request(ushort Command, ushort Flags, ulong Cookie, long Offset, uint Length);
}
