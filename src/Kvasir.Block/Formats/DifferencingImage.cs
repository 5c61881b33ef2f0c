using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>An image with an id that overlays made over it remember.</summary>
internal interface IIdentifiedImage
{
    Guid Id { get; }
}

/// <summary>Where a block of a <see cref="DifferencingImage"/> comes from.</summary>
internal enum DifferencingState
{
    Parent,
    Zero,
    Present,

    /// <summary>A bitmap says it sector by sector.</summary>
    Partial,
}

/// <summary>
/// Base of the differencing disks, VHD's and VHDX's, and of others with a bit for each sector: equal blocks, of which each sector comes from the image or from its parent. Read-only. The parent
/// is held to the id that the image was made over, so that no other file is ever read in its place.
/// </summary>
public abstract class DifferencingImage : BlockNode, IOverlayFormat
{
    private const int MostBitmaps = 64;

    // Configuration
    private readonly string _format;
    private readonly int _block;
    private readonly int _sector;
    private readonly IReadOnlyList<Guid> _parentIds;

    // State
    private readonly Dictionary<long, byte[]> _bitmaps = [];
    private BlockNode? _backing;

    private protected DifferencingImage(BlockNode file, string format, int block, int sector, string? parent, IReadOnlyList<Guid> parentIds)
    {
        File = file;
        _format = format;
        _block = block;
        _sector = sector;
        _parentIds = parentIds;
        BackingFileName = parent;
    }

    public override string Driver => _format;

    public override BlockNode File { get; }

    public override BlockNode? Backing => _backing;

    public override bool IsReadOnly => true;

    public override int ClusterSize => _block;

    public override int RequestAlignment => _sector;

    public string? BackingFileName { get; }

    /// <summary>Parents are of the same format: nothing else is ever taken for one.</summary>
    public string? BackingFormat => BackingFileName is null ? null : _format;

    /// <exception cref="BlockException">It is not the image that this one was made over.</exception>
    public void SetBacking(BlockNode? backing)
    {
        if (backing is not null)
        {
            if (backing is not IIdentifiedImage parent)
                throw new BlockException($"'{backing.FileName}' is not of format {_format}, as the parent of '{FileName}' is");
            bool known = false;
            foreach (Guid id in _parentIds)
                known |= id == parent.Id;
            if (!known)
                throw new BlockException($"'{backing.FileName}' is not the parent of '{FileName}', or has been written since: its id is {parent.Id}, and the overlay was made over {string.Join(" or ", _parentIds)}");
        }
        _backing = backing;
    }

    /// <summary>What a block is made of, the place of its bytes, and the place of its sectors' bits where it has some.</summary>
    /// <exception cref="BlockException">The table says what cannot be.</exception>
    private protected abstract (DifferencingState State, long Host, long Bitmap) Locate(long block);

    /// <summary>Whether a sector's bit is set.</summary>
    private protected abstract bool IsOwn(byte[] bitmap, int sector);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            (DifferencingState state, long host, long run) = await FindAsync(offset, buffer.Length, cancellation).ConfigureAwait(false);
            Memory<byte> part = buffer[..(int)run];
            if (state == DifferencingState.Present)
            {
                await File.ReadAsync(host, part, cancellation).ConfigureAwait(false);
            }
            else
            {
                await ReadBelowAsync(state == DifferencingState.Parent ? _backing : null, offset, part, cancellation).ConfigureAwait(false);
            }
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        (DifferencingState state, long host, long run) = await FindAsync(offset, length, cancellation).ConfigureAwait(false);
        return state switch
        {
            DifferencingState.Present => new BlockStatus(run, BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid, host),
            DifferencingState.Zero => new BlockStatus(run, BlockFlags.Zero | BlockFlags.Allocated),
            _ => new BlockStatus(run, _backing is null ? BlockFlags.Zero : BlockFlags.None),
        };
    }

    /// <summary>Where the bytes from an offset on come from, never <see cref="DifferencingState.Partial"/>, and for how many that holds.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<(DifferencingState State, long Host, long Run)> FindAsync(long offset, long length, CancellationToken cancellation)
    {
        long block = offset / _block;
        int within = (int)(offset % _block);
        (DifferencingState state, long host, long bitmapAt) = Locate(block);
        long run = _block - within;
        if (state == DifferencingState.Partial)
        {
            byte[] bitmap = await BitmapAsync(block, bitmapAt, cancellation).ConfigureAwait(false);
            int sector = within / _sector;
            bool own = IsOwn(bitmap, sector);
            long most = Math.Min(run, length);
            do
                run = ((long)++sector * _sector) - within;
            while (run < most && IsOwn(bitmap, sector) == own);
            state = own ? DifferencingState.Present : DifferencingState.Parent;
        }
        return (state, host + within, Math.Min(run, length));
    }

    private async ValueTask<byte[]> BitmapAsync(long block, long at, CancellationToken cancellation)
    {
        lock (_bitmaps)
        {
            if (_bitmaps.TryGetValue(block, out byte[]? known))
                return known;
        }
        byte[] bitmap = new byte[((_block / _sector) + 7) / 8];
        if (at < 0 || at > File.Length - bitmap.Length)
            throw BlockException.Corrupt($"A sector bitmap of {FileName} is outside the file");
        await File.ReadAsync(at, bitmap, cancellation).ConfigureAwait(false);
        lock (_bitmaps)
        {
            if (_bitmaps.Count >= MostBitmaps)
                _bitmaps.Clear();
            _bitmaps[block] = bitmap;
        }
        return bitmap;
    }
}
