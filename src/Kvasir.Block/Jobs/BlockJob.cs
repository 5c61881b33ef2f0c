using System;
using System.Diagnostics;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Jobs;

public enum JobState
{
    Running,

    /// <summary>Source and target agree, and stay so until <see cref="BlockJob.Complete"/> (mirror, active commit).</summary>
    Ready,
    Done,
    Cancelled,
    Failed,
}

/// <summary>
/// A long operation on a disk in use. It runs beside the guest's requests; its speed can be changed, it can be paused and cancelled at any
/// time, and its task ends when it has.
/// </summary>
public abstract class BlockJob : IAsyncDisposable
{
    private readonly CancellationTokenSource _cancel = new();
    private readonly TaskCompletionSource _complete = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly TaskCompletionSource _ready = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Lock _lock = new();
    private TaskCompletionSource? _paused;
    private double _debt;
    private long _paid = Stopwatch.GetTimestamp();
    private int _state;

    protected BlockJob() => Completion = Task.CompletedTask;

    /// <summary>What kind it is: "mirror", "stream", "commit", "backup".</summary>
    public abstract string Kind { get; }

    /// <summary>Bytes done.</summary>
    public abstract long Done { get; }

    /// <summary>Bytes to do in all, as far as is known.</summary>
    public abstract long Total { get; }

    /// <summary>Bytes per second; 0: as fast as it goes.</summary>
    public long Speed { get; set; }

    public JobState State => (JobState)Volatile.Read(ref _state);

    /// <summary>Ends with the job; fails with what failed it.</summary>
    public Task Completion { get; private set; }

    /// <summary>Ends when the job is ready, or has ended.</summary>
    public Task Ready => _ready.Task;

    protected CancellationToken Cancellation => _cancel.Token;

    /// <summary>Starts the job; it is in charge of its graph from here on.</summary>
    protected void Begin() => Completion = Task.Run(RunGuardedAsync, CancellationToken.None);

    /// <summary>Lets a job that is ready finish.</summary>
    public void Complete() => _complete.TrySetResult();

    /// <summary>Stops it where it is. The disk in use is not touched by that.</summary>
    public async ValueTask CancelAsync()
    {
        Resume();
        await _cancel.CancelAsync().ConfigureAwait(false);
        await Completion.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
    }

    public void Pause()
    {
        lock (_lock)
            _paused ??= new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
    }

    public void Resume()
    {
        TaskCompletionSource? paused;
        lock (_lock)
            (paused, _paused) = (_paused, null);
        paused?.SetResult();
    }

    public async ValueTask DisposeAsync()
    {
        await CancelAsync().ConfigureAwait(false);
        _cancel.Dispose();
        GC.SuppressFinalize(this);
    }

    /// <summary>The job's work.</summary>
    protected abstract Task RunAsync();

    /// <summary>Takes the job's filters out of the graph again, however it ended.</summary>
    protected virtual ValueTask LeaveAsync() => default;

    /// <summary>Waits as long as the speed and a pause want before more bytes are moved.</summary>
    protected async ValueTask PaceAsync(long bytes)
    {
        while (true)
        {
            Task? paused;
            lock (_lock)
                paused = _paused?.Task;
            if (paused is null)
                break;
            await paused.WaitAsync(Cancellation).ConfigureAwait(false);
        }
        Cancellation.ThrowIfCancellationRequested();
        long speed = Speed;
        if (speed <= 0)
            return;
        TimeSpan wait;
        lock (_lock)
        {
            long now = Stopwatch.GetTimestamp();
            _debt = Math.Max(0, _debt - (Stopwatch.GetElapsedTime(_paid, now).TotalSeconds * speed));
            _paid = now;
            wait = TimeSpan.FromSeconds(_debt / speed);
            _debt += bytes;
        }
        if (wait > TimeSpan.Zero)
            await Task.Delay(wait, Cancellation).ConfigureAwait(false);
    }

    /// <summary>Says that source and target agree, and waits for the order to finish or for <paramref name="changed"/>.</summary>
    protected async ValueTask<bool> WaitReadyAsync(Task changed)
    {
        Volatile.Write(ref _state, (int)JobState.Ready);
        _ready.TrySetResult();
        Task first = await Task.WhenAny(_complete.Task, changed).WaitAsync(Cancellation).ConfigureAwait(false);
        return first == _complete.Task || _complete.Task.IsCompleted;
    }

    private async Task RunGuardedAsync()
    {
        JobState end = JobState.Failed;
        try
        {
            // Where what it leaves behind cannot be closed, the copy may lack its end: such a job has failed.
            end = await RunToEndAsync().ConfigureAwait(false);
        }
        finally
        {
            Volatile.Write(ref _state, (int)end);
            _ready.TrySetResult();
        }
    }

    private async Task<JobState> RunToEndAsync()
    {
        try
        {
            await RunAsync().ConfigureAwait(false);
            return JobState.Done;
        }
        catch (OperationCanceledException) when (_cancel.IsCancellationRequested)
        {
            return JobState.Cancelled;
        }
        finally
        {
            await LeaveAsync().ConfigureAwait(false);
        }
    }
}
