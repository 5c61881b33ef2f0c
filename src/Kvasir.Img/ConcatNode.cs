using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;

namespace Kvasir.Img;

/// <summary>Several disks after each other, read-only (convert of more than one source). The parts stay their owner's.</summary>
internal sealed class ConcatNode(IReadOnlyList<BlockNode> parts) : BlockNode
{
    public override string Driver => "concat";

    public override bool IsReadOnly => true;

    public override long Length
    {
        get
        {
            long total = 0;
            foreach (BlockNode part in parts)
                total += part.Length;
            return total;
        }
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            (BlockNode part, long within) = Find(offset);
            int length = (int)Math.Min(buffer.Length, part.Length - within);
            await part.ReadAsync(within, buffer[..length], cancellation).ConfigureAwait(false);
            buffer = buffer[length..];
            offset += length;
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        (BlockNode part, long within) = Find(offset);
        BlockStatus status = await ChainStatus.MergedAsync(part, within, Math.Min(length, part.Length - within), cancellation).ConfigureAwait(false);
        return new BlockStatus(status.Length, (status.Flags & (BlockFlags.Data | BlockFlags.Zero)) | BlockFlags.Allocated);
    }

    private (BlockNode Part, long Within) Find(long offset)
    {
        foreach (BlockNode part in parts)
        {
            if (offset < part.Length)
                return (part, offset);
            offset -= part.Length;
        }
        throw new BlockException("read past the end", BlockErrno.Io);
    }
}
