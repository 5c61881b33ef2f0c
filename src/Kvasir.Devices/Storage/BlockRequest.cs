using System;
using System.Runtime.CompilerServices;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Kvasir.Linux;

namespace Kvasir.Devices.Storage;

public enum BlockOperation
{
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// <summary>
/// A request on its way through a disk's back end, with its data in guest memory. Used again and again: once warm, a request allocates nothing. Data in one
/// run goes straight from and to guest memory; data in several goes through a buffer, which costs less than a host call each.
/// </summary>
public abstract class BlockRequest
{
    /// <summary>Bytes that one host call moves at most where data is scattered.</summary>
    private const int Chunk = 1 << 20;

    private readonly Action _continue;
    private ConfiguredValueTaskAwaitable.ConfiguredValueTaskAwaiter _awaiter;
    private AlignedBuffer? _bounce;
    private GuestRun _direct;
    private bool _isDirect;
    private long _done;
    private int _step;

    protected BlockRequest() => _continue = Continue;

    public BlockOperation Operation { get; private set; }

    /// <summary>Where on the disk, in bytes.</summary>
    public long Offset { get; private set; }

    /// <summary>Bytes.</summary>
    public long Length { get; private set; }

    /// <summary>Writes are stable when they end.</summary>
    public bool ForceUnitAccess { get; private set; }

    /// <summary>Zeroed space may be given back to the host.</summary>
    public bool MayUnmap { get; private set; }

    /// <summary>The buffer that holds the data.</summary>
    protected VirtqueueElement? Element { get; set; }

    protected DiskBackend? Backend { get; set; }

    /// <summary>Where the data begins in the readable (writes) or writable (reads) part of the buffer, in bytes.</summary>
    protected long DataOffset { get; set; }

    /// <summary>Prepares the next piece of work.</summary>
    protected void Prepare(BlockOperation operation, long offset, long length, bool forceUnitAccess = false, bool mayUnmap = false)
    {
        Operation = operation;
        Offset = offset;
        Length = length;
        ForceUnitAccess = forceUnitAccess;
        MayUnmap = mayUnmap;
        _done = 0;
    }

    /// <summary>Begins.</summary>
    /// <returns>True where it has ended already, with <paramref name="errno"/>; otherwise <see cref="Ended"/> is called, or the request is kept for later.</returns>
    public bool Begin(out int errno)
    {
        try
        {
            return Run(out errno);
        }
        catch (BlockException error)
        {
            return Failed(error, out errno);
        }
    }

    /// <summary>It ended on another thread. The device is held.</summary>
    protected abstract void Ended(int errno);

    /// <summary>It failed and waits in the back end for the VM to go on; the device is to be let go of.</summary>
    protected abstract void Kept();

    private bool Run(out int errno)
    {
        errno = 0;
        while (true)
        {
            ValueTask step = StartStep();
            if (!step.IsCompleted)
            {
                _awaiter = step.ConfigureAwait(false).GetAwaiter();
                _awaiter.UnsafeOnCompleted(_continue);
                return false;
            }
            step.GetAwaiter().GetResult();
            if (FinishStep())
                return true;
        }
    }

    /// <summary>A host call ended, on one of the host's threads.</summary>
    private void Continue()
    {
        bool ended;
        int errno;
        try
        {
            _awaiter.GetResult();
            ended = FinishStep();
            errno = 0;
            if (!ended)
                ended = Run(out errno);
        }
        catch (BlockException error)
        {
            ended = Failed(error, out errno);
        }
        if (ended)
            Ended(errno);
    }

    private ValueTask StartStep()
    {
        BlockNode node = Backend!.Node;
        switch (Operation)
        {
            case BlockOperation.Read:
                Pick(Element!.Writable);
                return node.ReadAsync(Offset + _done, _isDirect ? _direct.Memory : _bounce!.Memory[.._step]);
            case BlockOperation.Write:
                Pick(Element!.Readable);
                if (!_isDirect)
                    Element.Read(DataOffset + _done, _bounce!.Memory.Span[.._step]);
                WriteFlags flags = ForceUnitAccess ? WriteFlags.ForceUnitAccess : WriteFlags.None;
                return node.WriteAsync(Offset + _done, _isDirect ? _direct.Memory : _bounce!.Memory[.._step], flags);
            case BlockOperation.Discard:
                _step = 0;
                return Backend.Settings.Discard ? node.DiscardAsync(Offset, Length) : default;
            case BlockOperation.WriteZeroes:
                _step = 0;
                ZeroFlags zero = (MayUnmap && Backend.Settings.Discard ? ZeroFlags.MayUnmap : 0) | (ForceUnitAccess ? ZeroFlags.ForceUnitAccess : 0);
                return node.WriteZeroesAsync(Offset, Length, zero);
            default:
                _step = 0;
                return node.FlushAsync();
        }
    }

    /// <returns>Whether that was the last.</returns>
    private bool FinishStep()
    {
        if (Operation is not (BlockOperation.Read or BlockOperation.Write))
            return true;
        if (Operation == BlockOperation.Read && !_isDirect)
            Element!.Write(DataOffset + _done, _bounce!.Memory.Span[.._step]);
        _done += _step;
        if (_done < Length)
            return false;
        _bounce?.Dispose();
        _bounce = null;
        return true;
    }

    /// <summary>Chooses what the next host call moves: the rest of the data where it is in one run, or a buffer's worth.</summary>
    private void Pick(ReadOnlySpan<GuestRun> runs)
    {
        long left = Length - _done;
        long skip = DataOffset + _done;
        foreach (ref readonly GuestRun run in runs)
        {
            if (skip >= run.Length)
            {
                skip -= run.Length;
                continue;
            }
            int here = run.Length - (int)skip;
            if (here >= left || here >= Chunk)
            {
                _step = (int)Math.Min(here, left);
                _direct = run.Slice((int)skip, _step);
                _isDirect = true;
                return;
            }
            break;
        }
        _isDirect = false;
        _step = (int)Math.Min(left, Chunk);
        // The rest of the request fits into the first buffer, or is cut into equal ones.
        _bounce ??= AlignedBuffer.Rent(_step);
    }

    private bool Failed(BlockException error, out int errno)
    {
        _bounce?.Dispose();
        _bounce = null;
        int verdict = Backend!.Judge(this, error.Errno, error.Message);
        errno = Math.Max(verdict, 0);
        if (verdict >= 0)
            return true;
        // Whoever takes it from the back end may run it already, on a hold of its own.
        Kept();
        return false;
    }
}
