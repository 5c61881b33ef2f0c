using System;
using System.Collections.Generic;
using System.Globalization;
using Kvasir.Core;

namespace Kvasir.Boot;

/// <summary>Something a loader put into guest memory.</summary>
/// <param name="What">For a person: "kernel", "initrd", "ACPI tables".</param>
/// <param name="Length">Bytes kept for it, which may be more than were written.</param>
public readonly record struct PlacedRange(string What, ulong Start, ulong Length)
{
    public ulong End => Start + Length;
}

/// <summary>Guest RAM as a loader sees it: knows what lies where, refuses overlaps and addresses without RAM, finds room.</summary>
internal sealed class BootMemory
{
    private const int FillChunk = 1 << 16;
    private static readonly byte[] Zeros = new byte[FillChunk];

    // Wiring
    private readonly GuestMemory _memory;

    // State
    private readonly List<PlacedRange> _placed = [];

    public BootMemory(GuestMemory memory)
    {
        _memory = memory;
        LowEnd = memory.LowSize;
    }

    /// <summary>One past the last byte of RAM below 4 GiB.</summary>
    public ulong LowEnd { get; }

    /// <summary>In ascending order.</summary>
    public IReadOnlyList<PlacedRange> Placed => _placed;

    /// <summary>Keeps a range of RAM for something, and fails with one line where that cannot be.</summary>
    public void Reserve(string what, ulong start, ulong length)
    {
        if (start + length < start || !IsRam(start, length))
        {
            throw new BootException(string.Create(CultureInfo.InvariantCulture,
                $"the {what} ({Size(length)} at {new Gpa(start)}) does not lie in the VM's {Size(_memory.Size)} of memory: give the VM more memory"));
        }
        foreach (PlacedRange other in _placed)
        {
            if (start < other.End && other.Start < start + length)
            {
                throw new BootException(
                    $"the {what} ({Size(length)} at {new Gpa(start)}) would overwrite the {other.What} ({Size(other.Length)} at {new Gpa(other.Start)})");
            }
        }
        if (length == 0)
            return;
        _placed.Add(new PlacedRange(what, start, length));
        _placed.Sort((a, b) => a.Start.CompareTo(b.Start));
    }

    /// <summary>Writes into a range that was reserved.</summary>
    public void Write(ulong address, ReadOnlySpan<byte> content)
    {
        if (!_memory.TryWrite(new Gpa(address), content))
            throw new BootException($"{content.Length} bytes at {new Gpa(address)} do not lie in the VM's memory");
    }

    /// <summary>Reserves and writes.</summary>
    public void Place(string what, ulong address, ReadOnlySpan<byte> content)
    {
        Reserve(what, address, (ulong)content.Length);
        Write(address, content);
    }

    /// <summary>Zeroes a range that was reserved. After a reset RAM holds what the guest left.</summary>
    public void Clear(ulong address, ulong length)
    {
        while (length > 0)
        {
            int run = (int)Math.Min(length, FillChunk);
            Write(address, Zeros.AsSpan(0, run));
            address += (ulong)run;
            length -= (ulong)run;
        }
    }

    /// <summary>Finds and reserves the lowest free room in [<paramref name="from"/>, <paramref name="to"/>).</summary>
    /// <exception cref="BootException">There is none.</exception>
    public ulong ReserveLowest(string what, ulong length, ulong alignment, ulong from, ulong to)
    {
        ulong at = Align(from, alignment);
        foreach (PlacedRange other in _placed)
        {
            if (other.End <= at)
                continue;
            if (Fits(at, length, other.Start, to))
                break;
            at = Math.Max(at, Align(other.End, alignment));
        }
        if (!Fits(at, length, to, to))
            throw NoRoom(what, length);
        Reserve(what, at, length);
        return at;
    }

    /// <summary>Finds and reserves the highest free room in [<paramref name="from"/>, <paramref name="to"/>).</summary>
    /// <exception cref="BootException">There is none.</exception>
    public ulong ReserveHighest(string what, ulong length, ulong alignment, ulong from, ulong to)
    {
        ulong end = to;
        for (int i = _placed.Count - 1; i >= 0; i--)
        {
            PlacedRange other = _placed[i];
            if (other.Start >= end)
                continue;
            if (other.End <= end && Down(end, length, alignment) is ulong candidate && candidate >= other.End)
                break;
            end = other.Start;
        }
        if (Down(end, length, alignment) is not ulong start || start < from)
            throw NoRoom(what, length);
        Reserve(what, start, length);
        return start;
    }

    /// <summary>Whether every byte of a range is RAM.</summary>
    public bool IsRam(ulong start, ulong length)
    {
        ulong at = start;
        while (at < start + length)
        {
            if (!_memory.TryFindRegion(at, out MemoryRegion region) || region.Kind != MemoryKind.Ram)
                return false;
            at = region.End;
        }
        return true;
    }

    /// <summary>A size for a person.</summary>
    public static string Size(ulong bytes) => bytes switch
    {
        >= 1ul << 30 when bytes % (1ul << 30) == 0 => string.Create(CultureInfo.InvariantCulture, $"{bytes >> 30} GiB"),
        >= 1ul << 20 => string.Create(CultureInfo.InvariantCulture, $"{(bytes + (1 << 20) - 1) >> 20} MiB"),
        >= 1ul << 10 => string.Create(CultureInfo.InvariantCulture, $"{(bytes + (1 << 10) - 1) >> 10} KiB"),
        _ => string.Create(CultureInfo.InvariantCulture, $"{bytes} bytes"),
    };

    public static ulong Align(ulong value, ulong alignment) => (value + alignment - 1) & ~(alignment - 1);

    private static bool Fits(ulong at, ulong length, ulong next, ulong to) => length <= to && at <= to - length && at + length <= next;

    private static ulong? Down(ulong end, ulong length, ulong alignment) => length > end ? null : (end - length) & ~(alignment - 1);

    private BootException NoRoom(string what, ulong length) =>
        new($"the {what} of {Size(length)} does not fit into the VM's {Size(_memory.Size)} of memory beside the rest: give the VM more memory");
}
