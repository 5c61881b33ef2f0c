using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Core;

/// <summary>What a part of the guest-physical address space is backed by.</summary>
public enum MemoryKind : byte
{
    Ram,

    /// <summary>Reads as memory; writes are dropped (firmware).</summary>
    Rom,
}

/// <summary>A run of guest-physical addresses backed by one run of the memory file.</summary>
/// <param name="Start">First guest-physical address; a multiple of 4 KiB.</param>
/// <param name="Length">Bytes; a multiple of 4 KiB.</param>
/// <param name="Offset">Where it lies in the memory file.</param>
public readonly record struct MemoryRegion(ulong Start, ulong Length, ulong Offset, MemoryKind Kind)
{
    public ulong End => Start + Length;
}

/// <summary>What is known of one 4 KiB page of the memory file.</summary>
[Flags]
public enum PageFlags : byte
{
    None = 0,

    /// <summary>Decoded or translated code was made from it: a write must be reported to the <see cref="ICodeObserver"/>.</summary>
    Code = 1 << 0,

    /// <summary>Written since the dirty log was last taken.</summary>
    Dirty = 1 << 1,
}

/// <summary>Who must hear of writes into pages marked <see cref="PageFlags.Code"/>.</summary>
public interface ICodeObserver
{
    /// <summary>Bytes of the memory file were written by a device. Any thread.</summary>
    void CodeWritten(ulong offset, int length);
}

/// <summary>
/// Guest memory: one memory file, mapped once, and the table of guest-physical regions that show parts of it. Nothing is allocated until
/// the guest or a device touches it. Accesses by devices go through <see cref="TryRead"/> and <see cref="TryWrite"/>, any thread; accelerators take
/// pointers. Layout changes happen only while no vCPU runs.
/// </summary>
public sealed unsafe partial class GuestMemory : IDisposable
{
    public const int PageSize = 4096;

    /// <summary>Where RAM below 4 GiB ends at most when there is more than fits: the space above belongs to ECAM, PCI and the APICs.</summary>
    public const ulong LowRamLimit = 0x8000_0000;

    /// <summary>All RAM fits below 4 GiB up to this size.</summary>
    public const ulong LowRamMaximum = 0xb000_0000;

    private const ulong FourGiB = 1ul << 32;
    private const ulong VideoHole = 0xa_0000;
    private const ulong VideoHoleEnd = 0xc_0000;

    /// <summary>Space at the file's end for ROM contents, in bytes.</summary>
    private const ulong RomSpace = 64ul << 20;

    // Configuration
    private readonly ulong _fileSize;

    // State
    private readonly byte* _host;
    private readonly byte* _flags;
    private MemoryRegion[] _regions;
    private ulong _romUsed;
    private bool _disposed;

    /// <summary>Makes RAM of <paramref name="size"/> bytes: from 0 with a hole at A0000h-BFFFFh, and what does not fit below 4 GiB from there on.</summary>
    /// <param name="size">Bytes, a multiple of 4 KiB and at least 1 MiB.</param>
    /// <param name="name">Shown by the kernel in /proc/PID/maps.</param>
    /// <exception cref="LinuxException">The host has no room for it.</exception>
    public GuestMemory(ulong size, string name = "guest-ram")
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(size, 1ul << 20);
        if (size % PageSize != 0)
            throw new ArgumentException($"{size} bytes of memory are no whole number of pages", nameof(size));
        Size = size;
        LowSize = size <= LowRamMaximum ? size : LowRamLimit;
        _fileSize = size + RomSpace;
        Fd = MemoryMap.CreateFile(name, _fileSize);
        try
        {
            _host = MemoryMap.MapFile(Fd, 0, _fileSize, Protection.Read | Protection.Write);
            _flags = MemoryMap.MapAnonymousMemory(_fileSize / PageSize, Protection.Read | Protection.Write);
        }
        catch (LinuxException)
        {
            if (_host != null)
                MemoryMap.Unmap(_host, _fileSize);
            MemoryMap.CloseFile(Fd);
            throw;
        }
        MemoryRegion low = new(0, VideoHole, 0, MemoryKind.Ram);
        MemoryRegion main = new(VideoHoleEnd, LowSize - VideoHoleEnd, VideoHoleEnd, MemoryKind.Ram);
        _regions = size == LowSize
            ? [low, main]
            : [low, main, new MemoryRegion(FourGiB, size - LowSize, LowSize, MemoryKind.Ram)];
        _largest = FindLargest(_regions);
    }

    /// <summary>RAM in bytes.</summary>
    public ulong Size { get; }

    /// <summary>Where RAM below 4 GiB ends.</summary>
    public ulong LowSize { get; }

    /// <summary>Bytes of RAM from 4 GiB on.</summary>
    public ulong HighSize => Size - LowSize;

    /// <summary>The memory file, for accelerators and processes that share it.</summary>
    public int Fd { get; }

    /// <summary>The memory file's size, RAM and ROM, in bytes.</summary>
    public ulong FileSize => _fileSize;

    /// <summary>The regions in ascending order; they do not overlap.</summary>
    public ReadOnlySpan<MemoryRegion> Regions => _regions;

    /// <summary>Where the memory file is mapped in this process. The address of file offset 0.</summary>
    public byte* Host => _host;

    /// <summary>One <see cref="PageFlags"/> byte for each page of the memory file.</summary>
    public byte* Flags => _flags;

    /// <summary>Hears of device writes to pages that hold decoded code.</summary>
    public ICodeObserver? CodeObserver { get; set; }

    /// <summary>Changes whenever the layout does.</summary>
    public int LayoutVersion { get; private set; }

    /// <summary>Puts a read-only image over whatever lies at an address.</summary>
    /// <param name="start">A multiple of 4 KiB.</param>
    /// <param name="content">Padded with zeros to whole pages.</param>
    /// <exception cref="ArgumentException">Not aligned, or the ROM space is used up.</exception>
    public void AddRom(Gpa start, ReadOnlySpan<byte> content)
    {
        ulong length = ((ulong)content.Length + PageSize - 1) & ~(ulong)(PageSize - 1);
        if (start.Value % PageSize != 0 || length == 0 || _romUsed + length > RomSpace)
            throw new ArgumentException($"no place for a ROM of {content.Length} bytes at {start}");
        ulong offset = Size + _romUsed;
        _romUsed += length;
        content.CopyTo(new Span<byte>(_host + offset, content.Length));
        Overlay(new MemoryRegion(start.Value, length, offset, MemoryKind.Rom));
    }

    /// <summary>Puts a region over whatever lies there, cutting what it covers.</summary>
    public void Overlay(MemoryRegion region)
    {
        System.Collections.Generic.List<MemoryRegion> result = [];
        foreach (MemoryRegion old in _regions)
        {
            if (old.End <= region.Start || old.Start >= region.End)
            {
                result.Add(old);
                continue;
            }
            if (old.Start < region.Start)
                result.Add(old with { Length = region.Start - old.Start });
            if (old.End > region.End)
                result.Add(old with { Start = region.End, Length = old.End - region.End, Offset = old.Offset + (region.End - old.Start) });
        }
        result.Add(region);
        result.Sort((a, b) => a.Start.CompareTo(b.Start));
        _regions = [.. result];
        _largest = FindLargest(_regions);
        LayoutVersion++;
    }

    /// <summary>The region that holds an address.</summary>
    public bool TryFindRegion(ulong address, out MemoryRegion region)
    {
        MemoryRegion[] regions = _regions;
        int low = 0;
        int high = regions.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) / 2;
            ref readonly MemoryRegion r = ref regions[middle];
            if (address < r.Start)
            {
                high = middle - 1;
            }
            else if (address >= r.End)
            {
                low = middle + 1;
            }
            else
            {
                region = r;
                return true;
            }
        }
        region = default;
        return false;
    }

    /// <summary>Copies guest memory out. Several regions may be crossed.</summary>
    /// <returns>False, with the destination undefined, where an address is neither RAM nor ROM.</returns>
    public bool TryRead(Gpa address, Span<byte> destination)
    {
        ulong at = address.Value;
        while (destination.Length > 0)
        {
            if (!TryFindRegion(at, out MemoryRegion region))
                return false;
            int run = (int)Math.Min((ulong)destination.Length, region.End - at);
            // SAFETY: [at, at + run) lies inside the region, and regions lie inside the mapped file.
            new ReadOnlySpan<byte>(_host + region.Offset + (at - region.Start), run).CopyTo(destination);
            destination = destination[run..];
            at += (ulong)run;
        }
        return true;
    }

    /// <summary>Copies into guest memory. Writes to ROM are dropped. Nothing is written unless all addresses are backed.</summary>
    /// <returns>False where an address is neither RAM nor ROM.</returns>
    public bool TryWrite(Gpa address, ReadOnlySpan<byte> source)
    {
        if (!IsBacked(address.Value, (ulong)source.Length))
            return false;
        ulong at = address.Value;
        while (source.Length > 0)
        {
            if (!TryFindRegion(at, out MemoryRegion region))
                return false;
            int run = (int)Math.Min((ulong)source.Length, region.End - at);
            if (region.Kind == MemoryKind.Ram)
            {
                ulong offset = region.Offset + (at - region.Start);
                // SAFETY: as in TryRead.
                source[..run].CopyTo(new Span<byte>(_host + offset, run));
                NoteWrite(offset, run);
            }
            source = source[run..];
            at += (ulong)run;
        }
        return true;
    }

    /// <summary>Reads a value of a blittable type, in guest byte order (little endian, as the host's).</summary>
    public bool TryRead<T>(Gpa address, out T value)
        where T : unmanaged
    {
        value = default;
        return TryRead(address, new Span<byte>(Unsafe.AsPointer(ref value), sizeof(T)));
    }

    /// <summary>Writes a value of a blittable type.</summary>
    public bool TryWrite<T>(Gpa address, T value)
        where T : unmanaged => TryWrite(address, new ReadOnlySpan<byte>(&value, sizeof(T)));

    /// <summary>Whether every address of a range is RAM or ROM.</summary>
    public bool IsBacked(ulong start, ulong length)
    {
        ulong at = start;
        ulong end = start + length;
        if (end < start)
            return false;
        while (at < end)
        {
            if (!TryFindRegion(at, out MemoryRegion region))
                return false;
            at = region.End;
        }
        return true;
    }

    /// <summary>
    /// A pointer to guest memory that stays valid until <see cref="Dispose"/>, or null where the range is not wholly in one region of RAM
    /// (or ROM, when only reading). Who writes through it calls <see cref="NoteWrite"/> after.
    /// </summary>
    public byte* Pointer(Gpa address, ulong length, bool write)
    {
        if (!TryFindRegion(address.Value, out MemoryRegion region) || length > region.End - address.Value)
            return null;
        if (write && region.Kind != MemoryKind.Ram)
            return null;
        return _host + region.Offset + (address.Value - region.Start);
    }

    /// <summary>Records that a device wrote bytes of the memory file: dirty tracking and self-modifying code depend on it.</summary>
    public void NoteWrite(ulong offset, int length)
    {
        // The data must be visible before the flag is looked at: a vCPU marks the page before it decodes from it.
        Interlocked.MemoryBarrier();
        NoteOrderedWrite(offset, length);
    }

    /// <summary><see cref="NoteWrite"/> of bytes that a full barrier has made visible since they were written, or that no code is made from.</summary>
    internal void NoteOrderedWrite(ulong offset, int length)
    {
        if (length <= 0)
            return;
        ulong first = offset / PageSize;
        ulong last = (offset + (ulong)length - 1) / PageSize;
        bool code = false;
        for (ulong page = first; page <= last; page++)
        {
            byte flags = _flags[page];
            code |= (flags & (byte)PageFlags.Code) != 0;
            if ((flags & (byte)PageFlags.Dirty) == 0)
                SetFlag(page, PageFlags.Dirty);
        }
        if (code)
            CodeObserver?.CodeWritten(offset, length);
    }

    /// <summary>Sets flags of one page of the memory file, atomically.</summary>
    public void SetFlag(ulong page, PageFlags flag)
    {
        // SAFETY: the flag array is padded to whole host pages, so the double word around any byte is inside it.
        int* word = (int*)(_flags + (page & ~3ul));
        Interlocked.Or(ref *word, (int)flag << (int)(page & 3) * 8);
    }

    /// <summary>Clears flags of one page of the memory file, atomically.</summary>
    public void ClearFlag(ulong page, PageFlags flag)
    {
        // SAFETY: as in SetFlag.
        int* word = (int*)(_flags + (page & ~3ul));
        Interlocked.And(ref *word, ~((int)flag << (int)(page & 3) * 8));
    }

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        MemoryMap.Unmap(_host, _fileSize);
        MemoryMap.Unmap(_flags, _fileSize / PageSize);
        MemoryMap.CloseFile(Fd);
    }
}
