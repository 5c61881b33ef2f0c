using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>Where a block of a <see cref="BlockTableImage"/> lies.</summary>
internal enum TableState
{
    /// <summary>Nowhere: the parent shows, or zeros.</summary>
    Absent,
    Zero,
    Present,
}

/// <summary>
/// Base of the formats that map a disk by one flat table of equal blocks. It does the splitting, the zero and the parent reads and the
/// serialised allocation; a format says where a block lies and how a new one is entered into its table.
/// </summary>
public abstract class BlockTableImage : BlockNode
{
    private readonly AsyncMutex _allocation = new();

    protected BlockTableImage(BlockNode file, int blockSize)
    {
        File = file;
        TableBlockSize = blockSize;
    }

    public override BlockNode File { get; }

    public override int ClusterSize => TableBlockSize;

    public override bool IsZeroWhenCreated => true;

    private protected int TableBlockSize { get; }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public override async ValueTask FlushAsync(CancellationToken cancellation = default) => await File.FlushAsync(cancellation).ConfigureAwait(false);

    /// <summary>State and place of a block.</summary>
    private protected abstract (TableState State, long Host) Locate(long block);

    /// <summary>Called before each write, for what an image says of its content as a whole.</summary>
    private protected virtual ValueTask ChangeAsync(CancellationToken cancellation) => default;

    /// <summary>Called before bytes of a block that has a place are written.</summary>
    private protected virtual ValueTask WritingAsync(long block, long host, CancellationToken cancellation) => default;

    /// <summary>Finds room for a block, whose bytes [0, size) the caller then writes. Called one at a time.</summary>
    private protected abstract ValueTask<long> ReserveAsync(long block, CancellationToken cancellation);

    /// <summary>Enters a reserved block whose content is written into the table.</summary>
    private protected abstract ValueTask CommitAsync(long block, long host, CancellationToken cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            int within = (int)(offset % TableBlockSize);
            int length = Math.Min(buffer.Length, TableBlockSize - within);
            (TableState state, long host) = Locate(offset / TableBlockSize);
            Memory<byte> part = buffer[..length];
            if (state == TableState.Present)
                await File.ReadAsync(host + within, part, cancellation).ConfigureAwait(false);
            else if (state == TableState.Absent && Backing is BlockNode backing && offset < backing.Length)
                await ReadParentAsync(backing, offset, part, cancellation).ConfigureAwait(false);
            else
                part.Span.Clear();
            buffer = buffer[length..];
            offset += length;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        if ((flags & WriteFlags.Compressed) != 0)
            throw new BlockException("Compression not supported for this file format", BlockErrno.NotSupported);
        await ChangeAsync(cancellation).ConfigureAwait(false);
        while (!buffer.IsEmpty)
        {
            int within = (int)(offset % TableBlockSize);
            int length = Math.Min(buffer.Length, TableBlockSize - within);
            (TableState state, long host) = Locate(offset / TableBlockSize);
            if (state == TableState.Present)
            {
                await WritingAsync(offset / TableBlockSize, host, cancellation).ConfigureAwait(false);
                await File.WriteAsync(host + within, buffer[..length], WriteFlags.None, cancellation).ConfigureAwait(false);
            }
            else
            {
                await AllocateAsync(offset / TableBlockSize, within, buffer[..length], cancellation).ConfigureAwait(false);
            }
            buffer = buffer[length..];
            offset += length;
        }
        if ((flags & WriteFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        while (length > 0)
        {
            long part = Math.Min(length, TableBlockSize - (offset % TableBlockSize));
            (TableState state, _) = Locate(offset / TableBlockSize);
            bool zeroAlready = state == TableState.Zero || (state == TableState.Absent && (Backing is null || offset >= Backing.Length));
            if (!zeroAlready)
                await WriteZeroDataAsync(offset, part, flags, cancellation).ConfigureAwait(false);
            offset += part;
            length -= part;
        }
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        long block = offset / TableBlockSize;
        (TableState state, long host) = Locate(block);
        long total = TableBlockSize - (offset % TableBlockSize);
        while (total < length)
        {
            (TableState nextState, long nextHost) = Locate(++block);
            if (nextState != state || (state == TableState.Present && nextHost != host + ((block - (offset / TableBlockSize)) * TableBlockSize)))
                break;
            total += TableBlockSize;
        }
        BlockFlags flags = state switch
        {
            TableState.Present => BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid,
            TableState.Zero => BlockFlags.Zero | BlockFlags.Allocated,
            _ when Backing is not null => BlockFlags.None,
            // Formats that have no overlays of their own count every block as theirs.
            _ => Driver is "vdi" or "vpc" ? BlockFlags.Zero | BlockFlags.Allocated : BlockFlags.Zero,
        };
        return new ValueTask<BlockStatus>(new BlockStatus(Math.Min(total, length), flags, state == TableState.Present ? host + (offset % TableBlockSize) : 0));
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private static async ValueTask ReadParentAsync(BlockNode backing, long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        int there = (int)Math.Min(buffer.Length, backing.Length - offset);
        await backing.ReadAsync(offset, buffer[..there], cancellation).ConfigureAwait(false);
        buffer.Span[there..].Clear();
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask AllocateAsync(long block, int within, ReadOnlyMemory<byte> data, CancellationToken cancellation)
    {
        await _allocation.EnterAsync().ConfigureAwait(false);
        try
        {
            (TableState state, long host) = Locate(block);
            if (state == TableState.Present)
            {
                await File.WriteAsync(host + within, data, WriteFlags.None, cancellation).ConfigureAwait(false);
                return;
            }
            host = await ReserveAsync(block, cancellation).ConfigureAwait(false);
            bool fromParent = state == TableState.Absent && Backing is BlockNode backing && block * TableBlockSize < backing.Length;
            if (!fromParent && host >= File.Length && File.IsGrowable && File.IsZeroWhenCreated)
            {
                // Behind the end of the file there are zeros already.
                await File.ResizeAsync(host + TableBlockSize, Preallocation.Off, cancellation).ConfigureAwait(false);
                await File.WriteAsync(host + within, data, WriteFlags.None, cancellation).ConfigureAwait(false);
            }
            else
            {
                byte[] whole = new byte[TableBlockSize];
                if (fromParent)
                    await ReadParentAsync(Backing!, block * TableBlockSize, whole, cancellation).ConfigureAwait(false);
                data.CopyTo(whole.AsMemory(within));
                await File.WriteAsync(host, whole, WriteFlags.None, cancellation).ConfigureAwait(false);
            }
            await CommitAsync(block, host, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _allocation.Exit();
        }
    }
}
