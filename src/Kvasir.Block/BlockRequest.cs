using System;
using System.Runtime.CompilerServices;
using Kvasir.Linux;

namespace Kvasir.Block;

public enum BlockOperation
{
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// <summary>
/// One request of a device to its <see cref="BlockBackend"/>. The device owns it, keeps a pool of them, and may use it again once
/// <see cref="OnCompleted"/> was called: submitting then allocates nothing. The memory it names stays the device's and must stay mapped
/// until then.
/// </summary>
public abstract class BlockRequest
{
    private NativeMemoryBlock?[] _blocks = new NativeMemoryBlock?[4];
    private Memory<byte>[] _segments = new Memory<byte>[4];
    private readonly Action _continuation;
    private ConfiguredValueTaskAwaitable.ConfiguredValueTaskAwaiter _running;
    private BlockBackend? _backend;
    private int _count;
    private long _bytes;

    protected BlockRequest() => _continuation = Continue;

    public BlockOperation Operation { get; set; }

    /// <summary>First byte of the disk that is meant.</summary>
    public long Offset { get; set; }

    /// <summary>Bytes of a discard or of zeroes; for reads and writes the segments say it.</summary>
    public long Length { get; set; }

    /// <summary>Stable on the medium before it completes (writes and zeroes).</summary>
    public bool ForceUnitAccess { get; set; }

    /// <summary>Zeroes may give room back.</summary>
    public bool MayUnmap { get; set; }

    /// <summary>How it ended: 0, or a positive errno (<see cref="BlockErrno"/>).</summary>
    public int Error { get; private set; }

    /// <summary>Why it failed, for a log line; null when it did not.</summary>
    public string? ErrorText { get; private set; }

    /// <summary>Bytes of all segments.</summary>
    public long Bytes => _bytes;

    /// <summary>Forgets the segments, for the next use.</summary>
    public void Clear()
    {
        _segments.AsSpan(0, _count).Clear();
        _count = 0;
        _bytes = 0;
        Length = 0;
        ForceUnitAccess = false;
        MayUnmap = false;
    }

    /// <summary>Adds memory that does not move, such as guest RAM. What follows the segment before it directly is joined to it.</summary>
    /// <param name="address">The host's address of its first byte.</param>
    /// <param name="length">Its bytes.</param>
    public void Add(nint address, int length)
    {
        if (length == 0)
            return;
        if (_count > 0 && _blocks[_count - 1] is NativeMemoryBlock last && last.Address + last.Length == address && last.Length <= int.MaxValue - length && _segments[_count - 1].Length == last.Length)
        {
            _segments[_count - 1] = last.Set(last.Address, last.Length + length);
            _bytes += length;
            return;
        }
        Grow();
        NativeMemoryBlock block = _blocks[_count] ??= new NativeMemoryBlock();
        _segments[_count++] = block.Set(address, length);
        _bytes += length;
    }

    /// <summary>Adds managed memory.</summary>
    public void Add(Memory<byte> memory)
    {
        if (memory.IsEmpty)
            return;
        Grow();
        _blocks[_count]?.Set(0, 0);
        _segments[_count++] = memory;
        _bytes += memory.Length;
    }

    /// <summary>The request has ended and <see cref="Error"/> says how. Called on any thread, also within the submission; must not block.</summary>
    protected abstract void OnCompleted();

    internal ReadOnlySpan<Memory<byte>> Segments => _segments.AsSpan(0, _count);

    internal void Start(BlockBackend backend)
    {
        Error = 0;
        ErrorText = null;
        _backend = backend;
#pragma warning disable CA2012 // The awaiter is asked for its result once, in Continue.
        _running = backend.RunAsync(this).ConfigureAwait(false).GetAwaiter();
#pragma warning restore CA2012
        if (_running.IsCompleted)
            Continue();
        else
            _running.UnsafeOnCompleted(_continuation);
    }

    /// <summary>Ends a request that was not begun.</summary>
    internal void Refuse(BlockException reason)
    {
        Error = reason.Errno;
        ErrorText = reason.Message;
        OnCompleted();
    }

    private void Grow()
    {
        if (_count < _segments.Length)
            return;
        Array.Resize(ref _segments, _count * 2);
        Array.Resize(ref _blocks, _count * 2);
    }

    private void Continue()
    {
        BlockBackend backend = _backend!;
        try
        {
            _running.GetResult();
        }
        catch (BlockException error)
        {
            Error = error.Errno;
            ErrorText = error.Message;
        }
        catch (OperationCanceledException error)
        {
            Error = BlockErrno.Canceled;
            ErrorText = error.Message;
        }
        catch (Exception error) when (error is System.IO.IOException or ObjectDisposedException or OutOfMemoryException or InvalidOperationException or ArgumentException or OverflowException)
        {
            Error = BlockErrno.Io;
            ErrorText = error.Message;
        }
        _running = default;
        _backend = null;
        // The device may use the request again at once: nothing of it is touched after the call.
        OnCompleted();
        backend.Ended();
    }
}
