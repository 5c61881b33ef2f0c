using System;
using System.Buffers;
using System.Threading;
using System.Threading.Tasks;
using System.Threading.Tasks.Sources;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>
/// One file request under way, in a ring or on a pool thread. Pooled: a request allocates nothing once the pool is warm. Its result
/// is the byte count, or -errno.
/// </summary>
internal sealed unsafe class FileOperation : IValueTaskSource<int>
{
    public enum Request
    {
        Read,
        Write,
        Sync,
        Allocate,
    }

    private const byte OpFsync = 3;
    private const byte OpFallocate = 17;
    private const byte OpRead = 22;
    private const byte OpWrite = 23;

    private static readonly Lock PoolLock = new();
    private static readonly FileOperation?[] Pool = new FileOperation?[256];
    private static int _pooled;

    // State
    private ManualResetValueTaskSourceCore<int> _source = default;
    private SafeFileHandle? _file;
    private MemoryHandle _pin;
    private Request _request;
    private long _offset;
    private long _length;
    private int _flags;
    private int _result;

    /// <summary>The next one in a queue of the ring's.</summary>
    public FileOperation? Next { get; set; }

    /// <summary>Starts a request; the memory stays pinned until it ends.</summary>
    public static ValueTask<int> StartAsync(SafeFileHandle file, Request request, long offset, ReadOnlyMemory<byte> memory, long length, int flags, bool ring)
    {
        FileOperation operation = Take();
        operation._file = file;
        operation._request = request;
        operation._offset = offset;
        operation._length = length;
        operation._flags = flags;
        operation._pin = request is Request.Read or Request.Write ? memory.Pin() : default;
        short token = operation._source.Version;
        if (ring && IoUring.Shared is IoUring shared)
            shared.Submit(operation);
        else
            FileThreads.Queue(operation);
        return new ValueTask<int>(operation, token);
    }

    /// <summary>Keeps the kernel's result until <see cref="OnKernelDone"/>.</summary>
    public void SetKernelResult(int result) => _result = result;

    /// <summary>Goes on after the ring, on a pool thread.</summary>
    public void OnKernelDone()
    {
        // A ring may give EAGAIN or EINTR where a plain call would have waited, and EINVAL for a request this kernel's rings lack.
        if (_result is -NativeFile.ErrorAgain or -4 or -NativeFile.ErrorInvalid)
            FileThreads.Queue(this);
        else
            Finish(_result);
    }

    /// <summary>What the ring's entry says.</summary>
    public void Describe(out byte opcode, out int fd, out long offset, out byte* buffer, out uint length, out uint flags)
    {
        fd = (int)_file!.DangerousGetHandle();
        offset = _offset;
        buffer = (byte*)_pin.Pointer;
        length = (uint)_length;
        flags = 0;
        switch (_request)
        {
            case Request.Read:
                opcode = OpRead;
                break;
            case Request.Write:
                opcode = OpWrite;
                flags = _flags != 0 ? 2u : 0u;
                break;
            case Request.Sync:
                opcode = OpFsync;
                offset = 0;
                buffer = null;
                length = 0;
                flags = 1;
                break;
            default:
                // IORING_OP_FALLOCATE: the length travels in the address field and the mode in the length.
                opcode = OpFallocate;
                buffer = (byte*)_length;
                length = (uint)_flags;
                break;
        }
    }

    /// <summary>Carries the request out with a call that waits.</summary>
    public void Execute()
    {
        SafeFileHandle file = _file!;
        // SAFETY: the memory is pinned for as long as the operation runs, and has _length bytes.
        int result = _request switch
        {
            Request.Read => NativeFile.Read(file, _offset, new Span<byte>(_pin.Pointer, (int)_length)),
            Request.Write => NativeFile.Write(file, _offset, new ReadOnlySpan<byte>(_pin.Pointer, (int)_length), _flags != 0),
            Request.Sync => NativeFile.SyncFileData(file),
            _ => NativeFile.Allocate(file, (AllocateMode)_flags, _offset, _length),
        };
        Finish(result);
    }

    int IValueTaskSource<int>.GetResult(short token)
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

    ValueTaskSourceStatus IValueTaskSource<int>.GetStatus(short token) => _source.GetStatus(token);

    void IValueTaskSource<int>.OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags) =>
        _source.OnCompleted(continuation, state, token, flags);

    private static FileOperation Take()
    {
        lock (PoolLock)
            return _pooled == 0 ? new FileOperation() : Pool[--_pooled]!;
    }

    private void Return()
    {
        lock (PoolLock)
        {
            if (_pooled < Pool.Length)
                Pool[_pooled++] = this;
        }
    }

    private void Finish(int result)
    {
        _pin.Dispose();
        _pin = default;
        _file = null;
        _source.SetResult(result);
    }
}
