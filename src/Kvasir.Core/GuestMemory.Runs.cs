using System;
using System.Buffers;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics.X86;

namespace Kvasir.Core;

/// <summary>
/// A run of guest RAM or ROM that is in one piece on the host too: what a device's DMA works on. It stays valid until the memory is disposed; a
/// device that wrote into it says so with <see cref="NoteWrite"/>. The guest may change its bytes at any moment: read each value once.
/// </summary>
public readonly struct GuestRun
{
    private readonly GuestMemory _memory;
    private readonly ulong _offset;

    internal GuestRun(GuestMemory memory, ulong offset, int length)
    {
        _memory = memory;
        _offset = offset;
        Length = length;
    }

    /// <summary>Bytes.</summary>
    public int Length { get; }

    public Span<byte> Span => _memory is null ? default : _memory.SpanOf(_offset, Length);

    /// <summary>The same bytes for requests that outlive a call.</summary>
    public Memory<byte> Memory => _memory is null ? default : _memory.MemoryOf(_offset, Length);

    /// <summary>Where it lies in the memory file: what is kept of it in a saved state.</summary>
    public ulong Offset => _offset;

    /// <summary>Part of the run.</summary>
    public GuestRun Slice(int start, int length)
    {
        if ((uint)start > (uint)Length || (uint)length > (uint)(Length - start))
            throw new ArgumentOutOfRangeException(nameof(start));
        return new GuestRun(_memory, _offset + (ulong)start, length);
    }

    /// <summary>Whether another run begins where this one ends, on the host.</summary>
    public bool IsFollowedBy(in GuestRun next) => next._memory == _memory && next._offset == _offset + (ulong)Length;

    /// <summary>Both in one. Only where <see cref="IsFollowedBy"/> says so and <see cref="GuestMemory.LargestRun"/> allows.</summary>
    public GuestRun Joined(in GuestRun next)
    {
        if (!IsFollowedBy(next) || (ulong)Length + (ulong)next.Length > GuestMemory.LargestRun)
            throw new ArgumentException("the runs do not follow one another", nameof(next));
        return new GuestRun(_memory, _offset, Length + next.Length);
    }

    /// <summary>Records that a device wrote its bytes.</summary>
    public void NoteWrite() => _memory?.NoteWrite(_offset, Length);

    /// <summary><see cref="NoteWrite"/> after a full barrier that followed the write: for several runs at once.</summary>
    public void NoteOrderedWrite() => _memory?.NoteOrderedWrite(_offset, Length);

    /// <summary>Has the processor fetch its first bytes, which will be needed soon and which another processor wrote.</summary>
    public void Prefetch() => _memory?.Prefetch(_offset);

    /// <summary>Gives its whole host pages back to the host; they read as zeros after.</summary>
    /// <returns>Bytes given back.</returns>
    public long Discard() => _memory?.Discard(_offset, Length) ?? 0;
}

/// <content>Guest memory as runs, for devices.</content>
public sealed unsafe partial class GuestMemory
{
    /// <summary>Bytes of the longest run.</summary>
    public const ulong LargestRun = 1ul << 30;

    private Window[]? _windows;

    private volatile LargestRegion _largest = new(default);

    /// <summary>The longest run that starts at an address, up to a length.</summary>
    /// <param name="address">Where it starts.</param>
    /// <param name="length">Bytes wanted; the run may be shorter where a region ends or at <see cref="LargestRun"/>.</param>
    /// <param name="write">It must be RAM.</param>
    /// <param name="run">The run, at least a byte long.</param>
    /// <returns>False where there is no memory of the kind at the address.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public bool TryGetRun(Gpa address, ulong length, bool write, out GuestRun run)
    {
        // Most of what a driver names is here.
        LargestRegion largest = _largest;
        ulong within = address.Value - largest.Start;
        if (within < largest.Length && length <= largest.Length - within && length - 1 < LargestRun)
        {
            run = new GuestRun(this, largest.Offset + within, (int)length);
            return true;
        }
        return TryFindRun(address, length, write, out run);
    }

    private bool TryFindRun(Gpa address, ulong length, bool write, out GuestRun run)
    {
        if (!TryFindRegion(address.Value, out MemoryRegion region) || (write && region.Kind != MemoryKind.Ram))
        {
            run = default;
            return false;
        }
        ulong inside = address.Value - region.Start;
        int bytes = (int)Math.Min(Math.Min(length, region.Length - inside), LargestRun);
        run = new GuestRun(this, region.Offset + inside, bytes);
        return bytes > 0;
    }

    /// <summary>A run by its place in the memory file.</summary>
    /// <param name="offset">Where it starts.</param>
    /// <param name="length">Bytes.</param>
    /// <param name="write">It must be RAM.</param>
    /// <param name="run">The run.</param>
    /// <returns>False where it is not inside.</returns>
    public bool TryRunAt(ulong offset, int length, bool write, out GuestRun run)
    {
        ulong end = write ? Size : _fileSize;
        bool inside = length > 0 && offset < end && (ulong)length <= end - offset;
        run = inside ? new GuestRun(this, offset, length) : default;
        return inside;
    }

    internal void Prefetch(ulong offset)
    {
        // SAFETY: an address as good as any: a prefetch does not fault.
        if (Sse.IsSupported)
            Sse.Prefetch0(_host + offset);
    }

    internal Span<byte> SpanOf(ulong offset, int length) => new(_host + offset, length);

    internal Memory<byte> MemoryOf(ulong offset, int length)
    {
        Window[] windows = _windows ?? MakeWindows();
        ulong index = offset / LargestRun;
        return windows[index].Memory.Slice((int)(offset - index * LargestRun), length);
    }

    internal long Discard(ulong offset, int length)
    {
        ulong first = (offset + PageSize - 1) & ~(ulong)(PageSize - 1);
        ulong end = (offset + (ulong)length) & ~(ulong)(PageSize - 1);
        if (end <= first)
            return 0;
        Kvasir.Linux.MemoryMap.PunchHole(Fd, first, end - first);
        // The page reads as zeros now, which is a write as far as dirty tracking and decoded code go.
        NoteWrite(first, (int)(end - first));
        return (long)(end - first);
    }

    private static LargestRegion FindLargest(ReadOnlySpan<MemoryRegion> regions)
    {
        MemoryRegion largest = default;
        foreach (MemoryRegion region in regions)
        {
            if (region.Kind == MemoryKind.Ram && region.Length > largest.Length)
                largest = region;
        }
        return new LargestRegion(largest);
    }

    /// <summary>One window for each <see cref="LargestRun"/> bytes of the file, each twice as long where the file allows, so that any run fits into one.</summary>
    private Window[] MakeWindows()
    {
        Window[] windows = new Window[(_fileSize + LargestRun - 1) / LargestRun];
        for (int i = 0; i < windows.Length; i++)
        {
            ulong start = (ulong)i * LargestRun;
            // SAFETY: the window lies inside the mapped file.
            windows[i] = new Window(_host + start, (int)Math.Min(_fileSize - start, 2 * LargestRun - 1));
        }
        _windows = windows;
        return windows;
    }

    /// <summary>The largest region of RAM; empty where there is none.</summary>
    private sealed class LargestRegion(MemoryRegion region)
    {
        public readonly ulong Start = region.Start;
        public readonly ulong Length = region.Length;
        public readonly ulong Offset = region.Offset;
    }

    /// <summary>Mapped memory as <see cref="Memory{T}"/>. It owns nothing: <see cref="GuestMemory"/> does.</summary>
    private sealed class Window(byte* start, int length) : MemoryManager<byte>
    {
        private readonly byte* _start = start;

        // SAFETY: the mapping lives until GuestMemory.Dispose, which comes after all devices have stopped.
        public override Span<byte> GetSpan() => new(_start, length);

        // SAFETY: the index is checked by Memory<T>; the mapping does not move.
        public override MemoryHandle Pin(int elementIndex = 0) => new(_start + elementIndex, default, this);

        public override void Unpin()
        {
        }

        protected override void Dispose(bool disposing)
        {
        }
    }
}
