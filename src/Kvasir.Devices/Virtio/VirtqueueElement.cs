using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// A buffer that a device had taken and not answered when it was saved. The driver may have been given its descriptors' places in a packed ring back meanwhile, so
/// what they said is kept.
/// </summary>
/// <param name="Queue">Index of the queue.</param>
/// <param name="Id">What the driver knows it by.</param>
/// <param name="Entries">Ring entries it takes (packed rings).</param>
/// <param name="Progress">What its device noted of it.</param>
/// <param name="Readable">Places in the memory file.</param>
/// <param name="Writable">Likewise.</param>
public sealed record HeldBuffer(int Queue, ushort Id, int Entries, long Progress, (ulong Offset, int Length)[] Readable, (ulong Offset, int Length)[] Writable);

/// <summary>
/// One buffer that the driver made available: what the device reads, then what it writes, as runs of guest memory. It belongs to its queue, which uses it
/// again after <see cref="Virtqueue.Push"/>.
/// </summary>
public sealed class VirtqueueElement
{
    /// <summary>Descriptors of one buffer, direct and indirect ones together. A longer chain is a driver's fault.</summary>
    public const int MaximumDescriptors = 1024;

    private GuestRun[] _runs = new GuestRun[8];
    private int _count;
    private int _readable;

    internal VirtqueueElement(Virtqueue queue) => Queue = queue;

    public Virtqueue Queue { get; }

    /// <summary>What the driver knows the buffer by.</summary>
    public ushort Id { get; internal set; }

    /// <summary>What the device may read, in order.</summary>
    public ReadOnlySpan<GuestRun> Readable => _runs.AsSpan(0, _readable);

    /// <summary>What the device may write, in order.</summary>
    public ReadOnlySpan<GuestRun> Writable => _runs.AsSpan(_readable, _count - _readable);

    /// <summary>Bytes.</summary>
    public long ReadableLength { get; private set; }

    /// <summary>Bytes.</summary>
    public long WritableLength { get; private set; }

    /// <summary>Ring entries it takes (packed rings).</summary>
    internal int Entries { get; set; }

    /// <summary>How far its device has come with it, in the device's own measure; 0 at first. It is saved with the buffer.</summary>
    internal long Progress { get; set; }

    /// <summary>It came out of a saved state and not out of the ring.</summary>
    internal bool WasHeld { get; private set; }

    /// <summary>Copies out of the readable part.</summary>
    /// <returns>Bytes copied: fewer where the part ends.</returns>
    public int Read(long offset, Span<byte> destination)
    {
        int done = 0;
        foreach (ref readonly GuestRun run in Readable)
        {
            if (offset >= run.Length)
            {
                offset -= run.Length;
                continue;
            }
            int part = Math.Min(run.Length - (int)offset, destination.Length - done);
            run.Span.Slice((int)offset, part).CopyTo(destination[done..]);
            done += part;
            offset = 0;
            if (done == destination.Length)
                break;
        }
        return done;
    }

    /// <summary>Copies into the writable part.</summary>
    /// <returns>Bytes copied: fewer where the part ends.</returns>
    public int Write(long offset, ReadOnlySpan<byte> source)
    {
        int done = 0;
        foreach (ref readonly GuestRun run in Writable)
        {
            if (offset >= run.Length)
            {
                offset -= run.Length;
                continue;
            }
            int part = Math.Min(run.Length - (int)offset, source.Length - done);
            source.Slice(done, part).CopyTo(run.Span[(int)offset..]);
            done += part;
            offset = 0;
            if (done == source.Length)
                break;
        }
        return done;
    }

    /// <summary>Reads a structure from the start of the readable part.</summary>
    /// <returns>False where the part is shorter.</returns>
    public bool TryRead<T>(long offset, out T value)
        where T : unmanaged
    {
        // Most drivers have it in one piece.
        if (_readable > 0 && (ulong)offset + (ulong)Unsafe.SizeOf<T>() <= (ulong)_runs[0].Length)
        {
            value = MemoryMarshal.Read<T>(_runs[0].Span[(int)offset..]);
            return true;
        }
        value = default;
        Span<byte> bytes = MemoryMarshal.AsBytes(new Span<T>(ref value));
        return Read(offset, bytes) == bytes.Length;
    }

    /// <summary>Writes a structure into the writable part.</summary>
    /// <returns>False where the part is shorter.</returns>
    public bool TryWrite<T>(long offset, in T value)
        where T : unmanaged
    {
        ReadOnlySpan<byte> bytes = MemoryMarshal.AsBytes(new ReadOnlySpan<T>(in value));
        return Write(offset, bytes) == bytes.Length;
    }

    /// <summary>Writes the last byte of the writable part, which is not empty.</summary>
    public void WriteLast(byte value) => _runs[_count - 1].Span[^1] = value;

    internal void Clear()
    {
        _count = 0;
        _readable = 0;
        ReadableLength = 0;
        WritableLength = 0;
        Entries = 0;
        Progress = 0;
        WasHeld = false;
    }

    internal HeldBuffer Save()
    {
        (ulong, int)[] readable = new (ulong, int)[Readable.Length];
        for (int i = 0; i < readable.Length; i++)
            readable[i] = (Readable[i].Offset, Readable[i].Length);
        (ulong, int)[] writable = new (ulong, int)[Writable.Length];
        for (int i = 0; i < writable.Length; i++)
            writable[i] = (Writable[i].Offset, Writable[i].Length);
        return new HeldBuffer(Queue.Index, Id, Entries, Progress, readable, writable);
    }

    /// <summary>Makes it what it was when it was saved.</summary>
    internal void Restore(GuestMemory memory, HeldBuffer held)
    {
        Clear();
        foreach ((ulong offset, int length) in held.Readable)
            AppendAt(memory, offset, length, write: false);
        foreach ((ulong offset, int length) in held.Writable)
            AppendAt(memory, offset, length, write: true);
        Id = held.Id;
        Entries = held.Entries;
        Progress = held.Progress;
        WasHeld = true;
    }

    /// <summary>Looks whether a saved buffer can be one of this machine's.</summary>
    /// <returns>What is wrong with it, or null.</returns>
    internal static string? Fault(GuestMemory memory, HeldBuffer held)
    {
        ulong total = 0;
        foreach ((ulong offset, int length) in held.Readable)
        {
            if (!memory.TryRunAt(offset, length, write: false, out _))
                return $"a buffer at {offset:x} of {length} bytes is not in memory";
            total += (ulong)length;
        }
        foreach ((ulong offset, int length) in held.Writable)
        {
            if (!memory.TryRunAt(offset, length, write: true, out _))
                return $"a buffer at {offset:x} of {length} bytes is not in memory";
            total += (ulong)length;
        }
        if (total > uint.MaxValue)
            return "a buffer is longer than 4 GiB";
        return held.Progress < 0 || (ulong)held.Progress > total ? $"a buffer of {total} bytes is done up to {held.Progress}" : null;
    }

    private void AppendAt(GuestMemory memory, ulong offset, int length, bool write)
    {
        if (!memory.TryRunAt(offset, length, write, out GuestRun run))
            throw new InvalidOperationException($"a saved buffer at {offset:x} of {length} bytes was not looked at");
        Append(run, write);
    }

    /// <summary>Appends what a descriptor describes.</summary>
    /// <returns>What is wrong with it, or null.</returns>
    internal string? Append(GuestMemory memory, ulong address, uint length, bool write)
    {
        if (!write && WritableLength > 0)
            return "a readable descriptor follows a writable one";
        if (address + length < address)
            return "a descriptor wraps around the address space";
        ulong left = length;
        while (left > 0)
        {
            if (!memory.TryGetRun(new Gpa(address), left, write, out GuestRun run))
                return $"a descriptor's address {address:x} is no memory";
            address += (ulong)run.Length;
            left -= (ulong)run.Length;
            Append(run, write);
        }
        return ReadableLength + WritableLength > uint.MaxValue ? "a buffer is longer than 4 GiB" : null;
    }

    /// <summary>After a full barrier that followed the writes.</summary>
    internal void NoteOrderedWrites()
    {
        foreach (ref readonly GuestRun run in Writable)
            run.NoteOrderedWrite();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private void Append(in GuestRun run, bool write)
    {
        if (write)
            WritableLength += run.Length;
        else
            ReadableLength += run.Length;
        bool sameKind = write ? _count > _readable : _count > 0;
        if (sameKind && _runs[_count - 1].IsFollowedBy(run) && (ulong)_runs[_count - 1].Length + (ulong)run.Length <= GuestMemory.LargestRun)
        {
            _runs[_count - 1] = _runs[_count - 1].Joined(run);
            return;
        }
        // It begins with what the device reads first.
        if (_count == 0)
            run.Prefetch();
        if (_count == _runs.Length)
            Array.Resize(ref _runs, _runs.Length * 2);
        _runs[_count++] = run;
        if (!write)
            _readable = _count;
    }
}
