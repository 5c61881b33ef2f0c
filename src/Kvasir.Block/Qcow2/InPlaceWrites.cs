using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

/// <summary>
/// Counts the writes that are under way to clusters where they are, outside of the metadata lock. A cluster that such a write has found may be dropped meanwhile; before
/// it becomes somebody else's, the write has to have ended. Writes are counted in two generations: what was dropped before the younger one began waits for the
/// elder one only, so that it is not kept for ever where writes never cease.
/// </summary>
internal sealed class InPlaceWrites
{
    private readonly Lock _lock = new();
    private readonly int[] _running = new int[2];
    private TaskCompletionSource? _idle;
    private int _young;

    /// <summary>Whether no write of the elder generation is left.</summary>
    public bool EldersEnded => Volatile.Read(ref _running[_young ^ 1]) == 0;

    /// <summary>Whether no write is under way.</summary>
    public bool AllEnded => EldersEnded && Volatile.Read(ref _running[_young]) == 0;

    /// <summary>A write begins; gives its generation. Metadata lock held.</summary>
    public int Begin()
    {
        Interlocked.Increment(ref _running[_young]);
        return _young;
    }

    /// <summary>A write has ended, with or without success.</summary>
    public void End(int generation)
    {
        if (Interlocked.Decrement(ref _running[generation]) != 0 || Volatile.Read(ref _idle) is null)
            return;
        lock (_lock)
            SignalIfIdle();
    }

    /// <summary>What runs now is of the elder generation from here on, whose writes have ended. Metadata lock held.</summary>
    public void Age() => _young ^= 1;

    /// <summary>Ends when no write is under way. Metadata lock held, so that none begins.</summary>
    public Task WaitAsync()
    {
        lock (_lock)
        {
            TaskCompletionSource idle = _idle ??= new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            // Whoever ends last sees that somebody waits, or this thread sees the end.
            Interlocked.MemoryBarrier();
            SignalIfIdle();
            return idle.Task;
        }
    }

    private void SignalIfIdle()
    {
        if (_idle is null || Volatile.Read(ref _running[0]) != 0 || Volatile.Read(ref _running[1]) != 0)
            return;
        _idle.SetResult();
        _idle = null;
    }
}
