using System;
using System.Buffers;
using System.Collections.Generic;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Threading;

namespace Kvasir.Linux;

/// <summary>
/// Page-aligned native memory for O_DIRECT and bounce buffers, pooled by power-of-two size. Dispose gives it
/// back; a buffer that nobody disposes is lost, as a span over it may outlive any finalizer.
/// </summary>
public sealed unsafe class AlignedBuffer : MemoryManager<byte>
{
    private const nuint PageSize = 4096;
    private const int SmallestShift = 12;
    private const int LargestPooledShift = 22;
    private const int PoolDepth = 32;

    private static readonly Lock PoolLock = new();
    private static readonly Stack<AlignedBuffer>[] Pools = CreatePools();

    private readonly byte* _address;
    private readonly int _shift;

    private AlignedBuffer(int shift)
    {
        _shift = shift;
        _address = (byte*)NativeMemory.AlignedAlloc((nuint)1 << shift, PageSize);
    }

    /// <summary>The host's address of the first byte.</summary>
    public nint Address => (nint)_address;

    /// <summary>A buffer of at least <paramref name="length"/> bytes; what it holds is undefined.</summary>
    public static AlignedBuffer Rent(int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(length, 1 << 30);
        int shift = Math.Max(SmallestShift, 32 - BitOperations.LeadingZeroCount((uint)Math.Max(length - 1, 1)));
        if (shift <= LargestPooledShift)
        {
            lock (PoolLock)
            {
                if (Pools[shift].TryPop(out AlignedBuffer? buffer))
                    return buffer;
            }
        }
        return new AlignedBuffer(shift);
    }

    /// <summary>Whether memory starts on a multiple of <paramref name="alignment"/>. Memory the GC may move never counts.</summary>
    public static bool IsAligned(ReadOnlyMemory<byte> memory, int alignment)
    {
        if (!MemoryMarshal.TryGetMemoryManager(memory, out MemoryManager<byte>? _, out _, out _))
            return false;
        // SAFETY: memory of a manager does not move while it is owned; only the address is looked at.
        fixed (byte* address = memory.Span)
            return ((nuint)address & (nuint)(alignment - 1)) == 0;
    }

    // SAFETY: the block has 1 << _shift bytes and lives until Dispose.
    public override Span<byte> GetSpan() => new(_address, 1 << _shift);

    public override MemoryHandle Pin(int elementIndex = 0) => new(_address + elementIndex, default, this);

    public override void Unpin()
    {
    }

    /// <summary>Gives the buffer back to the pool.</summary>
    public void Dispose() => ((IDisposable)this).Dispose();

    protected override void Dispose(bool disposing)
    {
        if (_shift <= LargestPooledShift)
        {
            lock (PoolLock)
            {
                if (Pools[_shift].Count < PoolDepth)
                {
                    Pools[_shift].Push(this);
                    return;
                }
            }
        }
        NativeMemory.AlignedFree(_address);
    }

    private static Stack<AlignedBuffer>[] CreatePools()
    {
        Stack<AlignedBuffer>[] pools = new Stack<AlignedBuffer>[LargestPooledShift + 1];
        for (int i = 0; i < pools.Length; i++)
            pools[i] = new Stack<AlignedBuffer>(PoolDepth);
        return pools;
    }
}
