using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>
/// The log of a VHDX ([MS-VHDX] 2.3): changes of metadata go here first, in entries of 4 KiB pages, so that a crash leaves either the old
/// or the new table. Each entry written here stands alone, as what the one before it said is stable by then.
/// </summary>
internal sealed class VhdxLog(BlockNode file, VhdxLayout layout)
{
    private const int Page = 4096;
    private const uint EntrySignature = 0x6567_6f6c;
    private const uint DataSignature = 0x6174_6164;
    private const uint DataDescriptor = 0x6373_6564;
    private const uint ZeroDescriptor = 0x6f72_657a;
    private const int FirstDescriptors = (Page - 64) / 32;

    private ulong _sequence = 1;
    private uint _place;
    private bool _open;

    /// <summary>Most pages that one entry can carry.</summary>
    public int LargestEntry => Math.Max(1, (int)Math.Min(FirstDescriptors, (layout.LogLength / Page) - 2));

    /// <summary>Carries out what the log says, and empties it.</summary>
    /// <exception cref="BlockException">It is needed and the file cannot be written, or it is damaged.</exception>
    public async ValueTask ReplayAsync(CancellationToken cancellation)
    {
        if (layout.LogGuid == Guid.Empty)
            return;
        if (layout.LogLength == 0 || layout.LogOffset > file.Length - layout.LogLength)
            throw new BlockException("VHDX log is outside the file");
        byte[] log = new byte[layout.LogLength];
        await file.ReadAsync(layout.LogOffset, log, cancellation).ConfigureAwait(false);
        List<byte[]> active = FindActive(log);
        if (active.Count > 0)
        {
            if (file.IsReadOnly)
                throw new BlockException($"VHDX image file '{file.FileName}' opened read-only, but contains a log that needs to be replayed", BlockErrno.Perm);
            // What this entry's writer knew to be stable must still be there.
            if (BinaryPrimitives.ReadInt64LittleEndian(active[^1].AsSpan(48)) > file.Length)
                throw new BlockException("VHDX file is shorter than its log says: it was cut off");
            foreach (byte[] entry in active)
                await ApplyAsync(entry, cancellation).ConfigureAwait(false);
            long last = BinaryPrimitives.ReadInt64LittleEndian(active[^1].AsSpan(56));
            if (last > file.Length && last <= VhdxLayout.LargestDisk * 2)
                await file.ResizeAsync(last, Preallocation.Off, cancellation).ConfigureAwait(false);
            await file.FlushAsync(cancellation).ConfigureAwait(false);
        }
        if (!file.IsReadOnly)
            await layout.WriteHeaderAsync(file, Guid.Empty, newContent: false, cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes pages of metadata by way of the log; stable when it returns. What they point at is stable already.</summary>
    /// <param name="pages">Where each goes, and what it says.</param>
    /// <param name="stable">Length of the file that is known to be stable.</param>
    /// <param name="cancellation">Ends it early.</param>
    public async ValueTask CommitAsync(IReadOnlyList<(long Offset, ReadOnlyMemory<byte> Page)> pages, long stable, CancellationToken cancellation)
    {
        if (!_open)
        {
            await layout.WriteHeaderAsync(file, Guid.NewGuid(), newContent: false, cancellation).ConfigureAwait(false);
            _open = true;
        }
        int length = Page + (pages.Count * Page);
        if (_place + length > layout.LogLength)
            _place = 0;
        byte[] entry = new byte[length];
        BinaryPrimitives.WriteUInt32LittleEndian(entry, EntrySignature);
        BinaryPrimitives.WriteInt32LittleEndian(entry.AsSpan(8), length);
        BinaryPrimitives.WriteUInt32LittleEndian(entry.AsSpan(12), _place);
        BinaryPrimitives.WriteUInt64LittleEndian(entry.AsSpan(16), _sequence);
        BinaryPrimitives.WriteInt32LittleEndian(entry.AsSpan(24), pages.Count);
        layout.LogGuid.TryWriteBytes(entry.AsSpan(32, 16));
        long end = (file.Length + (1 << 20) - 1) & ~((1L << 20) - 1);
        BinaryPrimitives.WriteInt64LittleEndian(entry.AsSpan(48), stable & ~((1L << 20) - 1));
        BinaryPrimitives.WriteInt64LittleEndian(entry.AsSpan(56), end);
        for (int i = 0; i < pages.Count; i++)
        {
            (long offset, ReadOnlyMemory<byte> page) = pages[i];
            Span<byte> descriptor = entry.AsSpan(64 + (i * 32), 32);
            BinaryPrimitives.WriteUInt32LittleEndian(descriptor, DataDescriptor);
            page.Span[^4..].CopyTo(descriptor[4..]);
            page.Span[..8].CopyTo(descriptor[8..]);
            BinaryPrimitives.WriteInt64LittleEndian(descriptor[16..], offset);
            BinaryPrimitives.WriteUInt64LittleEndian(descriptor[24..], _sequence);
            Span<byte> data = entry.AsSpan(Page + (i * Page), Page);
            page.Span.CopyTo(data);
            BinaryPrimitives.WriteUInt32LittleEndian(data, DataSignature);
            BinaryPrimitives.WriteUInt32LittleEndian(data[4..], (uint)(_sequence >> 32));
            BinaryPrimitives.WriteUInt32LittleEndian(data[^4..], (uint)_sequence);
        }
        BinaryPrimitives.WriteUInt32LittleEndian(entry.AsSpan(4), VhdxLayout.Checksum(entry, 4));
        await file.WriteAsync(layout.LogOffset + _place, entry, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.FlushAsync(cancellation).ConfigureAwait(false);
        foreach ((long offset, ReadOnlyMemory<byte> page) in pages)
            await file.WriteAsync(offset, page, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.FlushAsync(cancellation).ConfigureAwait(false);
        _place = (uint)((_place + length) % layout.LogLength);
        _sequence++;
    }

    /// <summary>The log has nothing to say any more.</summary>
    public async ValueTask CloseAsync(CancellationToken cancellation)
    {
        if (_open)
            await layout.WriteHeaderAsync(file, Guid.Empty, newContent: false, cancellation).ConfigureAwait(false);
        _open = false;
    }

    /// <summary>The newest run of entries that is whole ([MS-VHDX] 2.3.2).</summary>
    private List<byte[]> FindActive(byte[] log)
    {
        List<byte[]> best = [];
        ulong bestSequence = 0;
        bool[] seen = new bool[log.Length / Page];
        for (int start = 0; start < log.Length; start += Page)
        {
            // An entry of a run that was followed already starts nothing better: it ends where that run ended.
            if (seen[start / Page])
                continue;
            List<byte[]> run = [];
            int at = start;
            ulong sequence = 0;
            while (run.Count < log.Length / Page && EntryAt(log, at) is byte[] entry)
            {
                ulong own = BinaryPrimitives.ReadUInt64LittleEndian(entry.AsSpan(16));
                if (run.Count > 0 && own != sequence + 1)
                    break;
                run.Add(entry);
                seen[at / Page] = true;
                sequence = own;
                at = (at + entry.Length) % log.Length;
            }
            if (run.Count == 0 || sequence <= bestSequence)
                continue;
            // The run counts from the entry that the last one calls its tail.
            uint tail = BinaryPrimitives.ReadUInt32LittleEndian(run[^1].AsSpan(12));
            int place = start;
            for (int i = 0; i < run.Count; i++)
            {
                if (place == tail)
                {
                    best = run[i..];
                    bestSequence = sequence;
                    break;
                }
                place = (place + run[i].Length) % log.Length;
            }
        }
        return best;
    }

    /// <summary>A whole and good entry; null: none.</summary>
    private byte[]? EntryAt(byte[] log, int at)
    {
        if (BinaryPrimitives.ReadUInt32LittleEndian(log.AsSpan(at)) != EntrySignature)
            return null;
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(log.AsSpan(at + 8));
        uint descriptors = BinaryPrimitives.ReadUInt32LittleEndian(log.AsSpan(at + 24));
        if (length < Page || length % Page != 0 || length > log.Length || descriptors > length / 32 || new Guid(log.AsSpan(at + 32, 16)) != layout.LogGuid || !HasShape(log, at, length, descriptors))
            return null;
        byte[] entry = new byte[length];
        int first = (int)Math.Min(length, log.Length - at);
        log.AsSpan(at, first).CopyTo(entry);
        log.AsSpan(0, entry.Length - first).CopyTo(entry.AsSpan(first));
        return BinaryPrimitives.ReadUInt32LittleEndian(entry.AsSpan(4)) == VhdxLayout.Checksum(entry, 4) ? entry : null;
    }

    /// <summary>
    /// Whether pages that begin as they should make up an entry: descriptors, then one page for each that has data. Entries that pass share no page, so that
    /// no log takes longer to read than its size allows.
    /// </summary>
    private static bool HasShape(byte[] log, int at, uint length, uint descriptors)
    {
        long pages = ((64 + (descriptors * 32L)) + Page - 1) / Page;
        long first = pages;
        for (uint i = 0; i < descriptors; i++)
        {
            uint signature = SignatureAt(log, at + 64 + (i * 32L));
            if (signature is not (DataDescriptor or ZeroDescriptor))
                return false;
            pages += signature == DataDescriptor ? 1 : 0;
        }
        if (pages * Page != length)
            return false;
        for (long page = first; page < pages; page++)
        {
            if (SignatureAt(log, at + (page * Page)) != DataSignature)
                return false;
        }
        return true;
    }

    private static uint SignatureAt(byte[] log, long at) => BinaryPrimitives.ReadUInt32LittleEndian(log.AsSpan((int)(at % log.Length)));

    private async ValueTask ApplyAsync(byte[] entry, CancellationToken cancellation)
    {
        ulong sequence = BinaryPrimitives.ReadUInt64LittleEndian(entry.AsSpan(16));
        uint count = BinaryPrimitives.ReadUInt32LittleEndian(entry.AsSpan(24));
        int data = (int)((64 + (count * 32L) + Page - 1) & ~(Page - 1L));
        for (int i = 0; i < count; i++)
        {
            byte[] descriptor = entry.AsSpan(64 + (i * 32), 32).ToArray();
            uint signature = BinaryPrimitives.ReadUInt32LittleEndian(descriptor);
            long offset = BinaryPrimitives.ReadInt64LittleEndian(descriptor.AsSpan(16));
            if (BinaryPrimitives.ReadUInt64LittleEndian(descriptor.AsSpan(24)) != sequence || offset < 0 || offset % Page != 0 || offset > VhdxLayout.LargestDisk * 2)
                throw new BlockException("VHDX log entry is damaged");
            if (signature == ZeroDescriptor)
            {
                long length = BinaryPrimitives.ReadInt64LittleEndian(descriptor.AsSpan(8));
                if (length < 0 || length % Page != 0 || length > VhdxLayout.LargestDisk)
                    throw new BlockException("VHDX log entry is damaged");
                await file.WriteZeroesAsync(offset, length, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
                continue;
            }
            if (signature != DataDescriptor || data + Page > entry.Length || BinaryPrimitives.ReadUInt32LittleEndian(entry.AsSpan(data)) != DataSignature)
                throw new BlockException("VHDX log entry is damaged");
            byte[] page = entry.AsSpan(data, Page).ToArray();
            ulong own = ((ulong)BinaryPrimitives.ReadUInt32LittleEndian(page.AsSpan(4)) << 32) | BinaryPrimitives.ReadUInt32LittleEndian(page.AsSpan(Page - 4));
            if (own != sequence)
                throw new BlockException("VHDX log entry is damaged");
            descriptor.AsSpan(8, 8).CopyTo(page);
            descriptor.AsSpan(4, 4).CopyTo(page.AsSpan(Page - 4));
            await file.WriteAsync(offset, page, WriteFlags.None, cancellation).ConfigureAwait(false);
            data += Page;
        }
    }
}
