using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Jobs;

/// <summary>
/// Which units of a disk a job has still to do. With a journal, a file holds the same bits: a unit is entered there before the write that
/// makes it dirty starts, so that a job whose process ended finds everything that it had left to do.
/// </summary>
public sealed class DirtyMap : IAsyncDisposable
{
    private const int HeaderBytes = 4096;
    private const int BegunAt = 20;
    private const ulong Magic = 0x4b56_4a4f_4252_4e4c;

    private readonly Lock _lock = new();
    private readonly AsyncMutex _journalLock = new();
    private readonly ulong[] _words;

    // What the journal says; guarded by the journal's lock.
    private readonly ulong[] _written;
    private readonly int _shift;
    private readonly long _units;
    private readonly HostFile? _journal;
    private readonly bool _durable;
    // Takes of a unit that are not done yet; guarded by the map's lock. Only with a journal.
    private readonly Dictionary<long, int> _taken = [];
    private long _count;
    private long _cursor;

    /// <summary>An empty map.</summary>
    /// <param name="length">Bytes of the disk.</param>
    /// <param name="granularity">Bytes of a unit, a power of two.</param>
    public DirtyMap(long length, int granularity)
        : this(length, granularity, null, durable: false)
    {
    }

    private DirtyMap(long length, int granularity, HostFile? journal, bool durable)
    {
        if (!BitOperations.IsPow2(granularity) || granularity < 512)
            throw new BlockException("A job's granularity must be a power of two, at least 512");
        Length = length;
        _shift = BitOperations.Log2((uint)granularity);
        _units = (length + granularity - 1) >> _shift;
        _words = new ulong[(_units + 63) / 64];
        _written = journal is null ? [] : new ulong[_words.Length];
        _journal = journal;
        _durable = durable;
    }

    public long Length { get; }

    public int Granularity => 1 << _shift;

    /// <summary>Bytes that are dirty, in whole units.</summary>
    public long DirtyBytes => Interlocked.Read(ref _count) << _shift;

    /// <summary>Whether a file holds the bits too.</summary>
    public bool HasJournal => _journal is not null;

    public bool IsEmpty => Interlocked.Read(ref _count) == 0;

    /// <summary>Opens a journal, or begins one. What it says is in the map at once.</summary>
    /// <param name="path">Its file.</param>
    /// <param name="length">Bytes of the disk.</param>
    /// <param name="granularity">Bytes of a unit; a journal's own counts if there is one.</param>
    /// <param name="durable">Survive a crash of the host too: each new dirty unit waits for the medium.</param>
    /// <returns>The map, and whether a job had begun to work on the journal: one that was not filled by then is begun anew.</returns>
    /// <exception cref="BlockException">The file is no journal, or one for another disk.</exception>
    public static async ValueTask<(DirtyMap Map, bool Resumed)> OpenJournalAsync(string path, long length, int granularity, bool durable)
    {
        bool there = System.IO.File.Exists(path) && new System.IO.FileInfo(path).Length > 0;
        HostFile file = there
            ? HostFile.Open(path, new HostFileOptions())
            : await HostFile.CreateAsync(path, 0, Preallocation.Off, new HostFileOptions()).ConfigureAwait(false);
        try
        {
            byte[] header = new byte[HeaderBytes];
            if (there)
                await file.ReadAsync(0, header).ConfigureAwait(false);
            bool known = BinaryPrimitives.ReadUInt64LittleEndian(header) == Magic;
            if (await IsEmptyAsync(file, length, granularity).ConfigureAwait(false) || (known && BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(BegunAt)) == 0))
            {
                // The process ended before there was anything to go on with.
                await file.ResizeAsync(0).ConfigureAwait(false);
                header.AsSpan().Clear();
                BinaryPrimitives.WriteUInt64LittleEndian(header, Magic);
                BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(8), length);
                BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(16), granularity);
                DirtyMap fresh = new(length, granularity, file, durable);
                await file.WriteAsync(HeaderBytes, new byte[fresh._words.Length * 8]).ConfigureAwait(false);
                await file.WriteAsync(0, header).ConfigureAwait(false);
                return (fresh, false);
            }
            if (!known || BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(8)) != length)
                throw new BlockException($"'{path}' is no journal of a job on this disk");
            int own = BinaryPrimitives.ReadInt32LittleEndian(header.AsSpan(16));
            DirtyMap map = new(length, own, file, durable);
            if (file.Length < HeaderBytes + (map._words.Length * 8L))
                throw new BlockException($"'{path}' is too short for a journal");
            byte[] bits = new byte[map._words.Length * 8];
            await file.ReadAsync(HeaderBytes, bits).ConfigureAwait(false);
            MemoryMarshal.Cast<byte, ulong>(bits.AsSpan()).CopyTo(map._words);
            for (int i = 0; i < map._words.Length; i++)
            {
                if (i == map._words.Length - 1 && map._units % 64 != 0)
                    map._words[i] &= (1ul << (int)(map._units % 64)) - 1;
                map._count += BitOperations.PopCount(map._words[i]);
                map._written[i] = map._words[i];
            }
            return (map, true);
        }
        catch
        {
            await file.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Whether a file is what is left of a journal that had no header yet: nothing but zeros, and no more of them than it has bits.</summary>
    private static async ValueTask<bool> IsEmptyAsync(HostFile file, long length, int granularity)
    {
        if (file.Length > HeaderBytes + ((((length / granularity) + 64) / 64) * 8) + 8)
            return false;
        byte[] all = new byte[file.Length];
        await file.ReadAsync(0, all).ConfigureAwait(false);
        return !all.AsSpan().ContainsAnyExcept((byte)0);
    }

    /// <summary>The journal says from now on what a job has left to do, all of which is in it.</summary>
    internal async ValueTask BeginAsync()
    {
        if (_journal is null)
            return;
        byte[] begun = new byte[4];
        BinaryPrimitives.WriteInt32LittleEndian(begun, 1);
        if (_durable)
            await _journal.FlushAsync().ConfigureAwait(false);
        await _journal.WriteAsync(BegunAt, begun).ConfigureAwait(false);
        if (_durable)
            await _journal.FlushAsync().ConfigureAwait(false);
    }

    /// <summary>Marks everything.</summary>
    public ValueTask SetAllAsync() => SetAsync(0, Length);

    /// <summary>Marks all units that a range touches; with a journal, they are in it when this ends.</summary>
    public ValueTask SetAsync(long offset, long length)
    {
        if (length <= 0)
            return default;
        lock (_lock)
            SetLocked(offset >> _shift, (offset + length - 1) >> _shift);
        return _journal is not null ? WriteJournalAsync(offset >> _shift, (offset + length - 1) >> _shift) : default;
    }

    /// <summary>Marks the units of an image's persistent bitmap (one bit for each of its own granularity, lowest first).</summary>
    public async ValueTask SetBitsAsync(ReadOnlyMemory<byte> bits, int granularityBits)
    {
        for (int i = 0; i < bits.Length; i++)
        {
            byte value = bits.Span[i];
            for (int bit = 0; value != 0 && bit < 8; bit++)
            {
                long at = ((i * 8L) + bit) << granularityBits;
                if ((value & (1 << bit)) != 0 && at < Length)
                    await SetAsync(at, Math.Min(1L << granularityBits, Length - at)).ConfigureAwait(false);
            }
        }
    }

    public bool IsSet(long offset)
    {
        lock (_lock)
            return (_words[offset >> (_shift + 6)] & (1ul << (int)((offset >> _shift) & 63))) != 0;
    }

    /// <summary>Takes the next run of dirty units, which are clean from then on in memory; the journal keeps them until <see cref="DoneAsync"/>.</summary>
    /// <param name="most">Longest run in bytes.</param>
    /// <param name="offset">Where it starts.</param>
    /// <param name="length">Its bytes, up to the disk's end.</param>
    public bool TryTake(long most, out long offset, out long length)
    {
        lock (_lock)
        {
            (offset, length) = (0, 0);
            if (_count == 0)
                return false;
            long first = Find(_cursor);
            if (first < 0)
                first = Find(0);
            long end = first;
            long limit = first + Math.Max(1, most >> _shift);
            while (end < _units && end < limit && (_words[end >> 6] & (1ul << (int)(end & 63))) != 0)
            {
                _words[end >> 6] &= ~(1ul << (int)(end & 63));
                CountTaken(end, 1);
                end++;
            }
            _count -= end - first;
            _cursor = end;
            offset = first << _shift;
            length = Math.Min((end - first) << _shift, Length - offset);
            return true;
        }
    }

    /// <summary>Where the next dirty unit is, without taking it.</summary>
    public bool TryPeek(out long offset)
    {
        lock (_lock)
        {
            offset = 0;
            if (_count == 0)
                return false;
            long unit = Find(_cursor);
            if (unit < 0)
                unit = Find(0);
            _cursor = unit;
            offset = unit << _shift;
            return true;
        }
    }

    /// <summary>Takes the dirty units of a range; the result says if there were any.</summary>
    public bool TakeRange(long offset, long length)
    {
        bool any = false;
        lock (_lock)
        {
            for (long unit = offset >> _shift; unit <= (offset + length - 1) >> _shift; unit++)
            {
                ulong bit = 1ul << (int)(unit & 63);
                if ((_words[unit >> 6] & bit) == 0)
                    continue;
                _words[unit >> 6] &= ~bit;
                CountTaken(unit, 1);
                _count--;
                any = true;
            }
        }
        return any;
    }

    /// <summary>
    /// Says that a taken range is done: its target has it, whatever happens to the process. Units that became dirty again meanwhile stay in the journal, also
    /// where they have been taken again: that copy is another one's to call done.
    /// </summary>
    public async ValueTask DoneAsync(long offset, long length)
    {
        if (_journal is null)
            return;
        await _journalLock.EnterAsync().ConfigureAwait(false);
        try
        {
            long first = offset >> _shift;
            long last = (offset + length - 1) >> _shift;
            lock (_lock)
            {
                for (long unit = first; unit <= last; unit++)
                {
                    ulong bit = 1ul << (int)(unit & 63);
                    if (CountTaken(unit, -1) == 0 && (_words[unit >> 6] & bit) == 0)
                        _written[unit >> 6] &= ~bit;
                }
            }
            await StoreAsync(first >> 6, last >> 6).ConfigureAwait(false);
        }
        finally
        {
            _journalLock.Exit();
        }
    }

    public async ValueTask DisposeAsync()
    {
        if (_journal is not null)
            await _journal.DisposeAsync().ConfigureAwait(false);
    }

    private int CountTaken(long unit, int change)
    {
        if (_journal is null)
            return 0;
        int count = _taken.GetValueOrDefault(unit) + change;
        if (count > 0)
            _taken[unit] = count;
        else
            _taken.Remove(unit);
        return Math.Max(0, count);
    }

    private void SetLocked(long first, long last)
    {
        for (long unit = first; unit <= last && unit < _units;)
        {
            int from = (int)(unit & 63);
            int to = (int)Math.Min(63, from + (last - unit));
            to = (int)Math.Min(to, from + (_units - 1 - unit));
            ulong mask = (to == 63 ? ulong.MaxValue : (1ul << (to + 1)) - 1) & ~((1ul << from) - 1);
            ulong added = mask & ~_words[unit >> 6];
            _words[unit >> 6] |= mask;
            _count += BitOperations.PopCount(added);
            unit += to - from + 1;
        }
    }

    private long Find(long from)
    {
        for (long word = from >> 6; word < _words.Length; word++)
        {
            ulong bits = _words[word];
            if (word == from >> 6)
                bits &= ~((1ul << (int)(from & 63)) - 1);
            if (bits != 0)
                return (word << 6) + BitOperations.TrailingZeroCount(bits);
        }
        return -1;
    }

    private async ValueTask WriteJournalAsync(long first, long last)
    {
        await _journalLock.EnterAsync().ConfigureAwait(false);
        try
        {
            bool changed = false;
            for (long unit = first; unit <= last && unit < _units; unit++)
            {
                ulong bit = 1ul << (int)(unit & 63);
                changed |= (_written[unit >> 6] & bit) == 0;
                _written[unit >> 6] |= bit;
            }
            if (changed)
                await StoreAsync(first >> 6, Math.Min(last, _units - 1) >> 6).ConfigureAwait(false);
        }
        finally
        {
            _journalLock.Exit();
        }
    }

    private async ValueTask StoreAsync(long first, long last)
    {
        byte[] bytes = MemoryMarshal.AsBytes(_written.AsSpan((int)first, (int)(last - first + 1))).ToArray();
        await _journal!.WriteAsync(HeaderBytes + (first * 8), bytes).ConfigureAwait(false);
        if (_durable)
            await _journal.FlushAsync().ConfigureAwait(false);
    }
}
