using System.Threading;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Virtio;

namespace Kvasir.Devices.Storage;

/// <summary>
/// A device's request to its disk, which ends in the call that began it where the host answers at once, and on another thread otherwise. One that fails may be
/// kept for later (<see cref="Disk"/>).
/// </summary>
public abstract class DiskRequest : BlockRequest
{
    private const int Submitting = 0;
    private const int Completed = 1;
    private const int Pending = 2;

    private int _phase;

    /// <summary>The error to tell the guest: a positive errno, or 0.</summary>
    protected int Outcome { get; private set; }

    /// <summary>Adds a part of the runs of a buffer as the request's memory.</summary>
    /// <param name="skip">Bytes at the start that are not data.</param>
    /// <param name="length">Bytes of data.</param>
    protected void AddRuns(System.ReadOnlySpan<GuestRun> runs, long skip, long length)
    {
        foreach (ref readonly GuestRun run in runs)
        {
            if (skip >= run.Length)
            {
                skip -= run.Length;
                continue;
            }
            int part = (int)System.Math.Min(run.Length - skip, length);
            if (part == 0)
                return;
            Add(run.Slice((int)skip, part).Memory);
            skip = 0;
            length -= part;
        }
    }

    /// <summary>
    /// Carries a transfer out within the call, where its memory is in one piece and the host has it at hand. Writes may stay in the disk's cache.
    /// </summary>
    /// <param name="disk">The disk.</param>
    /// <param name="operation">A read or a write.</param>
    /// <param name="offset">First byte of the disk that is meant.</param>
    /// <param name="runs">As for <see cref="AddRuns"/>.</param>
    /// <param name="skip">Likewise.</param>
    /// <param name="length">Likewise.</param>
    /// <returns>True where it has ended well. After false nothing has begun: <see cref="Run"/> is the way.</returns>
    protected bool RunNow(Disk disk, BlockOperation operation, long offset, System.ReadOnlySpan<GuestRun> runs, long skip, long length)
    {
        foreach (ref readonly GuestRun run in runs)
        {
            if (skip >= run.Length)
            {
                skip -= run.Length;
                continue;
            }
            if (run.Length - skip < length || !disk.Backend.TryRunNow(operation, offset, run.Span.Slice((int)skip, (int)length)))
                return false;
            Outcome = 0;
            return true;
        }
        return false;
    }

    /// <summary>Hands it to the disk's back end.</summary>
    /// <returns>True where it has ended, with <see cref="Outcome"/>. After false nothing of it may be touched: <see cref="Ended"/> or <see cref="Kept"/> is called, or was.</returns>
    protected bool Run(Disk disk)
    {
        CurrentDisk = disk;
        _phase = Submitting;
        disk.Backend.Submit(this);
        return Interlocked.Exchange(ref _phase, Pending) == Completed && Conclude();
    }

    /// <summary>It ended, on one of the host's threads.</summary>
    protected abstract void Ended();

    /// <summary>It failed and waits for the VM to go on.</summary>
    protected abstract void Kept();

    protected sealed override void OnCompleted()
    {
        if (Interlocked.Exchange(ref _phase, Completed) == Pending && Conclude())
            Ended();
    }

    private Disk? CurrentDisk { get; set; }

    private bool Conclude()
    {
        Outcome = Error;
        if (Error == 0)
            return true;
        int verdict = CurrentDisk!.Judge(this);
        if (verdict >= 0)
        {
            Outcome = verdict;
            return true;
        }
        // Whoever takes it from the disk may run it already, on a hold of its own.
        Kept();
        return false;
    }
}
