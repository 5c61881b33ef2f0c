using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using System.Threading.Tasks.Sources;

namespace Kvasir.Linux;

/// <summary>
/// Builder of asynchronous methods on the data path: a method that has to wait takes its state machine's box from a pool, deep enough for
/// many requests at once, so that in steady state nothing is allocated. (The runtime's pooling builder keeps one box per thread and core.)
/// The execution context does not flow: nothing below a device reads async-local values. The task may be awaited once.
/// </summary>
public struct PooledMethodBuilder
{
    private PooledBox? _box;
    private Exception? _error;

    /// <summary>The method's task.</summary>
    public readonly ValueTask Task => _box is not null ? new ValueTask(_box, _box.Version) : _error is null ? default : ValueTask.FromException(_error);

#pragma warning disable CA1000, CA1822 // The shape that the compiler asks for.
    public static PooledMethodBuilder Create() => default;

    public readonly void Start<TStateMachine>(ref TStateMachine stateMachine)
        where TStateMachine : IAsyncStateMachine => stateMachine.MoveNext();

    public readonly void SetStateMachine(IAsyncStateMachine stateMachine)
    {
    }
#pragma warning restore CA1000, CA1822

    public readonly void SetResult() => _box?.Complete();

    public void SetException(Exception exception)
    {
        if (_box is null)
            _error = exception;
        else
            _box.Fail(exception);
    }

    public void AwaitOnCompleted<TAwaiter, TStateMachine>(ref TAwaiter awaiter, ref TStateMachine stateMachine)
        where TAwaiter : INotifyCompletion
        where TStateMachine : IAsyncStateMachine => awaiter.OnCompleted(Box(ref stateMachine).Resume);

    public void AwaitUnsafeOnCompleted<TAwaiter, TStateMachine>(ref TAwaiter awaiter, ref TStateMachine stateMachine)
        where TAwaiter : ICriticalNotifyCompletion
        where TStateMachine : IAsyncStateMachine => awaiter.UnsafeOnCompleted(Box(ref stateMachine).Resume);

    private PooledBox Box<TStateMachine>(ref TStateMachine stateMachine)
        where TStateMachine : IAsyncStateMachine
    {
        if (_box is not null)
            return _box;
        PooledBox.Of<TStateMachine> box = PooledBox.Of<TStateMachine>.Take();
        // The builder lies in the state machine: it has to know its box before the machine is copied there.
        _box = box;
        box.Machine = stateMachine;
        return box;
    }
}

/// <summary>A waiting method: its state machine and its task.</summary>
internal abstract class PooledBox : IValueTaskSource
{
    private ManualResetValueTaskSourceCore<bool> _source;

    public short Version => _source.Version;

    /// <summary>Continues the method; made once for each box.</summary>
    public Action Resume { get; protected init; } = null!;

    public void Complete() => _source.SetResult(true);

    public void Fail(Exception exception) => _source.SetException(exception);

    public void GetResult(short token)
    {
        try
        {
            _source.GetResult(token);
        }
        finally
        {
            _source.Reset();
            Return();
        }
    }

    public ValueTaskSourceStatus GetStatus(short token) => _source.GetStatus(token);

    public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags) =>
        _source.OnCompleted(continuation, state, token, flags);

    protected abstract void Return();

    internal sealed class Of<TStateMachine> : PooledBox
        where TStateMachine : IAsyncStateMachine
    {
        private const int Depth = 256;

        private static readonly Lock PoolLock = new();
        private static readonly Of<TStateMachine>?[] Pool = new Of<TStateMachine>?[Depth];
        private static int _pooled;

        private TStateMachine _machine = default!;

        private Of() => Resume = () => _machine.MoveNext();

        public TStateMachine Machine
        {
            set => _machine = value;
        }

        public static Of<TStateMachine> Take()
        {
            lock (PoolLock)
            {
                if (_pooled > 0)
                    return Pool[--_pooled]!;
            }
            return new Of<TStateMachine>();
        }

        protected override void Return()
        {
            _machine = default!;
            lock (PoolLock)
            {
                if (_pooled < Depth)
                    Pool[_pooled++] = this;
            }
        }
    }
}

/// <summary>The same for methods with a result.</summary>
public struct PooledMethodBuilder<TResult>
{
    private PooledResultBox<TResult>? _box;
    private Exception? _error;
    private TResult? _result;

    /// <summary>The method's task.</summary>
    public readonly ValueTask<TResult> Task =>
        _box is not null ? new ValueTask<TResult>(_box, _box.Version) : _error is null ? new ValueTask<TResult>(_result!) : ValueTask.FromException<TResult>(_error);

#pragma warning disable CA1000, CA1822 // The shape that the compiler asks for.
    public static PooledMethodBuilder<TResult> Create() => default;

    public readonly void Start<TStateMachine>(ref TStateMachine stateMachine)
        where TStateMachine : IAsyncStateMachine => stateMachine.MoveNext();

    public readonly void SetStateMachine(IAsyncStateMachine stateMachine)
    {
    }
#pragma warning restore CA1000, CA1822

    public void SetResult(TResult result)
    {
        if (_box is null)
            _result = result;
        else
            _box.Complete(result);
    }

    public void SetException(Exception exception)
    {
        if (_box is null)
            _error = exception;
        else
            _box.Fail(exception);
    }

    public void AwaitOnCompleted<TAwaiter, TStateMachine>(ref TAwaiter awaiter, ref TStateMachine stateMachine)
        where TAwaiter : INotifyCompletion
        where TStateMachine : IAsyncStateMachine => awaiter.OnCompleted(Box(ref stateMachine).Resume);

    public void AwaitUnsafeOnCompleted<TAwaiter, TStateMachine>(ref TAwaiter awaiter, ref TStateMachine stateMachine)
        where TAwaiter : ICriticalNotifyCompletion
        where TStateMachine : IAsyncStateMachine => awaiter.UnsafeOnCompleted(Box(ref stateMachine).Resume);

    private PooledResultBox<TResult> Box<TStateMachine>(ref TStateMachine stateMachine)
        where TStateMachine : IAsyncStateMachine
    {
        if (_box is not null)
            return _box;
        PooledResultBox<TResult>.Of<TStateMachine> box = PooledResultBox<TResult>.Of<TStateMachine>.Take();
        _box = box;
        box.Machine = stateMachine;
        return box;
    }
}

/// <summary>A waiting method with a result.</summary>
internal abstract class PooledResultBox<TResult> : IValueTaskSource<TResult>
{
    private ManualResetValueTaskSourceCore<TResult> _source;

    public short Version => _source.Version;

    public Action Resume { get; protected init; } = null!;

    public void Complete(TResult result) => _source.SetResult(result);

    public void Fail(Exception exception) => _source.SetException(exception);

    public TResult GetResult(short token)
    {
        try
        {
            return _source.GetResult(token);
        }
        finally
        {
            _source.Reset();
            Return();
        }
    }

    public ValueTaskSourceStatus GetStatus(short token) => _source.GetStatus(token);

    public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags) =>
        _source.OnCompleted(continuation, state, token, flags);

    protected abstract void Return();

    internal sealed class Of<TStateMachine> : PooledResultBox<TResult>
        where TStateMachine : IAsyncStateMachine
    {
        private const int Depth = 256;

        private static readonly Lock PoolLock = new();
        private static readonly Of<TStateMachine>?[] Pool = new Of<TStateMachine>?[Depth];
        private static int _pooled;

        private TStateMachine _machine = default!;

        private Of() => Resume = () => _machine.MoveNext();

        public TStateMachine Machine
        {
            set => _machine = value;
        }

        public static Of<TStateMachine> Take()
        {
            lock (PoolLock)
            {
                if (_pooled > 0)
                    return Pool[--_pooled]!;
            }
            return new Of<TStateMachine>();
        }

        protected override void Return()
        {
            _machine = default!;
            lock (PoolLock)
            {
                if (_pooled < Depth)
                    Pool[_pooled++] = this;
            }
        }
    }
}
