using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Numerics;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

/// <summary>Changes the width of the reference counts.</summary>
public sealed partial class Qcow2Image
{
    /// <summary>
    /// Gives the image reference counts of another width (amend refcount_bits=). New blocks and a new table are written behind everything
    /// else and the header switches to them with one write, so that a crash leaves either the old counts or the new ones.
    /// </summary>
    /// <exception cref="BlockException">The width is not possible, or a count does not fit into it.</exception>
    public async ValueTask SetRefcountBitsAsync(int bits, CancellationToken cancellation = default)
    {
        if (bits is < 1 or > 64 || !BitOperations.IsPow2(bits))
            throw new BlockException("Refcount width must be a power of two and may not exceed 64 bits");
        if (bits == RefcountBits)
            return;
        if (_header.Version < 3)
            throw new BlockException("Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)");
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            await RewriteRefcountsAsync(BitOperations.Log2((uint)bits), cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    private async ValueTask RewriteRefcountsAsync(int order, CancellationToken cancellation)
    {
        HashSet<long> old = [.. _refcounts.MetadataClusters];
        long first = Math.Max(_refcounts.AllocatedEnd, (_file.Length + _clusterSize - 1) & ~(_clusterSize - 1L)) >> _clusterBits;
        int perBlock = 1 << (_clusterBits + 3 - order);
        // The new structures count themselves.
        long blocks = 0;
        long tableClusters = 0;
        while (blocks * perBlock < first + blocks + tableClusters)
        {
            blocks = (first + blocks + tableClusters + perBlock - 1) / perBlock;
            tableClusters = ((blocks * 8) + _clusterSize - 1) >> _clusterBits;
        }
        ulong largest = order == 6 ? ulong.MaxValue : (1ul << (1 << order)) - 1;
        byte[] table = new byte[checked((int)(tableClusters << _clusterBits))];
        byte[] block = new byte[_clusterSize];
        for (long i = 0; i < blocks; i++)
        {
            block.AsSpan().Clear();
            for (int j = 0; j < perBlock; j++)
            {
                long cluster = (i * perBlock) + j;
                ulong count = cluster >= first
                    ? (cluster < first + blocks + tableClusters ? 1ul : 0)
                    : old.Contains(cluster) ? 0 : await _refcounts.GetAsync(cluster, cancellation).ConfigureAwait(false);
                if (count > largest)
                {
                    throw new BlockException(
                        $"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset 0x{cluster << _clusterBits:x} has a refcount of {count}", BlockErrno.Invalid);
                }
                if (count != 0)
                    RefcountTable.Store(block, j, order, count);
            }
            await _file.WriteAsync((first + i) << _clusterBits, block, WriteFlags.None, cancellation).ConfigureAwait(false);
            BinaryPrimitives.WriteInt64BigEndian(table.AsSpan((int)(i * 8)), (first + i) << _clusterBits);
        }
        await _file.WriteAsync((first + blocks) << _clusterBits, table, WriteFlags.None, cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        _header.RefcountOrder = order;
        _header.RefcountTableOffset = (first + blocks) << _clusterBits;
        _header.RefcountTableClusters = (int)tableClusters;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        await ReloadTablesAsync(cancellation).ConfigureAwait(false);
    }
}
