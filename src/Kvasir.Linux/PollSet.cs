using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>What poll(2) waits for and reports.</summary>
[Flags]
public enum PollEvents : short
{
    None = 0,
    Input = 1,
    Priority = 2,
    Output = 4,
    Error = 8,
    HangUp = 16,
    Invalid = 32,
}

/// <summary>A list of descriptors for poll(2), filled anew for each wait. One thread; allocates only when it grows.</summary>
public sealed unsafe partial class PollSet : IDisposable
{
    private const int Interrupted = 4;

    private Entry* _entries;
    private int _capacity = 64;

    private struct Entry
    {
        public int Fd;
        public PollEvents Events;
        public PollEvents Returned;
    }

    public PollSet() => _entries = (Entry*)NativeMemory.Alloc((nuint)_capacity, (nuint)sizeof(Entry));

    ~PollSet() => NativeMemory.Free(_entries);

    public int Count { get; private set; }

    public void Clear() => Count = 0;

    /// <returns>The descriptor's index, for <see cref="Returned"/>.</returns>
    public int Add(int fd, PollEvents events)
    {
        if (Count == _capacity)
        {
            _capacity *= 2;
            // SAFETY: the old block is not used after this.
            _entries = (Entry*)NativeMemory.Realloc(_entries, (nuint)_capacity * (nuint)sizeof(Entry));
        }
        _entries[Count] = new Entry { Fd = fd, Events = events };
        return Count++;
    }

    /// <summary>What the last wait found on a descriptor.</summary>
    public PollEvents Returned(int index)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(index);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(index, Count);
        return _entries[index].Returned;
    }

    /// <param name="milliseconds">How long at most; negative: without limit.</param>
    /// <returns>How many descriptors have something; -1 where the kernel refused the list.</returns>
    public int Wait(int milliseconds)
    {
        // SAFETY: the kernel writes Returned of the first Count entries, all of which are there.
        int result = poll(_entries, (ulong)Count, milliseconds);
        if (result >= 0)
            return result;
        for (int index = 0; index < Count; index++)
            _entries[index].Returned = PollEvents.None;
        return Marshal.GetLastPInvokeError() == Interrupted ? 0 : -1;
    }

    public void Dispose()
    {
        NativeMemory.Free(_entries);
        _entries = null;
        _capacity = 0;
        Count = 0;
        GC.SuppressFinalize(this);
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial int poll(Entry* entries, ulong count, int milliseconds);
}
