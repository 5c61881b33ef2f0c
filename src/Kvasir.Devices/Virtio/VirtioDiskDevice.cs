using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <summary>A virtio device whose queues bring requests to disks: a pool of request objects, and the way of each from its buffer to its answer.</summary>
public abstract class VirtioDiskDevice : VirtioDevice
{
    /// <summary>Requests that end at once are answered together, so many at most: the driver's processor reads the ring's indices while this one writes them.</summary>
    private const int Batch = 16;

    /// <summary>Bytes for whose transfer no answer waits.</summary>
    private const long BatchBytes = 128 << 10;

    /// <summary>Buffers that were taken together, and have not begun; on the stack of a queue's thread.</summary>
    [InlineArray(Batch)]
    private struct Buffers
    {
        private VirtqueueElement? _first;
    }

    /// <summary>Answers that wait for others; likewise.</summary>
    [InlineArray(Batch)]
    private struct Answers
    {
        private (VirtqueueElement Element, uint Written) _first;
    }

    // State
    private readonly Lock _pool = new();
    private VirtioDiskRequest?[] _free = new VirtioDiskRequest?[16];
    private int _freeCount;

    private protected VirtioDiskDevice(VirtioType type, string name, Core.GuestMemory memory, ReadOnlySpan<ushort> queueSizes, int configSize, int workers)
        : base(type, name, memory, queueSizes, configSize, workers)
    {
    }

    private protected abstract VirtioDiskRequest NewRequest();

    /// <summary>Begins what waits in a queue.</summary>
    private protected void ProcessRequests(Virtqueue queue)
    {
        Buffers buffers = default;
        int taken = 0;
        int next = 0;
        Answers answers = default;
        int waiting = 0;
        long bytes = 0;
        // A request that ends at once leaves its object and its hold to the next one.
        VirtioDiskRequest? request = null;
        try
        {
            while (true)
            {
                if (next == taken)
                {
                    next = 0;
                    taken = queue.Pop(buffers);
                    if (taken == 0)
                        break;
                }
                VirtqueueElement element = buffers[next++]!;
                if (request is null)
                {
                    request = Take();
                    HoldAgain();
                }
                long size = element.ReadableLength + element.WritableLength;
                bytes += size;
                if (waiting == Batch || (waiting > 0 && bytes > BatchBytes))
                {
                    queue.Push(answers[..waiting]);
                    queue.Notify();
                    waiting = 0;
                    bytes = size;
                }
                if (!request.Serve(element))
                {
                    request = null;
                    continue;
                }
                answers[waiting++] = (element, request.Conclude());
            }
        }
        finally
        {
            queue.Push(answers[..waiting]);
            queue.Notify();
            while (next < taken)
                queue.Forget(buffers[next++]!);
            if (request is not null)
            {
                Give(request);
                Release();
            }
        }
    }

    /// <summary>Runs again what failed and waited for the VM to go on. The caller holds the device.</summary>
    private protected void RetryKept(Disk disk)
    {
        foreach (DiskRequest kept in disk.TakeKept())
        {
            VirtioDiskRequest request = (VirtioDiskRequest)kept;
            HoldAgain();
            if (request.TryAgain())
                request.Finish();
        }
    }

    /// <summary>Names the buffers of what waits for the VM to go on.</summary>
    private protected static void CollectKept(Disk disk, List<VirtqueueElement> held)
    {
        foreach (DiskRequest kept in disk.PeekKept())
            held.Add(((VirtioDiskRequest)kept).Buffer);
    }

    /// <summary>Forgets what waited: the device is reset.</summary>
    private protected static void DropKept(Disk disk)
    {
        foreach (DiskRequest kept in disk.TakeKept())
            ((VirtioDiskRequest)kept).Drop();
    }

    /// <summary>Takes a request object back.</summary>
    internal void Give(VirtioDiskRequest request)
    {
        lock (_pool)
        {
            if (_freeCount == _free.Length)
                Array.Resize(ref _free, _free.Length * 2);
            _free[_freeCount++] = request;
        }
    }

    private VirtioDiskRequest Take()
    {
        lock (_pool)
        {
            if (_freeCount > 0)
                return _free[--_freeCount]!;
        }
        return NewRequest();
    }
}

/// <summary>One request of the driver's. It holds its device from when it begins until it is answered, dropped or kept for later.</summary>
internal abstract class VirtioDiskRequest(VirtioDiskDevice device) : DiskRequest
{
    /// <summary>Its buffer; null between two requests.</summary>
    protected VirtqueueElement? Element { get; private set; }

    /// <summary>Its buffer, while it has one.</summary>
    public VirtqueueElement Buffer => Element!;

    /// <summary>Understands a buffer and begins.</summary>
    /// <returns>Whether it has ended already, and <see cref="Conclude"/> is to be called.</returns>
    public bool Serve(VirtqueueElement element)
    {
        Element = element;
        return Begin(element);
    }

    /// <summary>Begins again after the VM was paused.</summary>
    /// <returns>Whether it has ended already.</returns>
    public abstract bool TryAgain();

    /// <summary>Answers the driver, and lets go of the device.</summary>
    public void Finish()
    {
        VirtqueueElement element = Element!;
        Element = null;
        element.Queue.Complete(element, WriteAnswer(element));
        Left();
        device.Give(this);
        device.Release();
    }

    /// <summary>Writes the answer. The buffer is the caller's to give back.</summary>
    /// <returns>How much of it was written.</returns>
    public uint Conclude()
    {
        VirtqueueElement element = Element!;
        Element = null;
        uint written = WriteAnswer(element);
        Left();
        return written;
    }

    /// <summary>Forgets the buffer: the device was reset while the request waited, or cannot answer it.</summary>
    public void Drop()
    {
        VirtqueueElement element = Element!;
        Element = null;
        element.Queue.Forget(element);
        Left();
        device.Give(this);
    }

    /// <inheritdoc cref="Serve"/>
    protected abstract bool Begin(VirtqueueElement element);

    /// <summary>A piece of work ended: goes on with the next.</summary>
    /// <returns>Whether the request has ended.</returns>
    protected abstract bool Next();

    /// <summary>Writes the answer into the buffer.</summary>
    /// <returns>Bytes that were written in all.</returns>
    protected abstract uint WriteAnswer(VirtqueueElement element);

    /// <summary>The driver has its buffer back, or it was dropped.</summary>
    protected virtual void Left()
    {
    }

    /// <summary>There is no way to answer such a buffer: the device stops.</summary>
    /// <returns>False: nothing of the request may be touched any more.</returns>
    protected bool Break(string reason)
    {
        device.Fail(reason);
        Drop();
        device.Release();
        return false;
    }

    protected sealed override void Ended()
    {
        if (Next())
            Finish();
    }

    protected sealed override void Kept() => device.Release();
}
