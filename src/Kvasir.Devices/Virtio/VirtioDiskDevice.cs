using System;
using System.Threading;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <summary>A virtio device whose queues bring requests to disks: a pool of request objects, and the way of each from its buffer to its answer.</summary>
public abstract class VirtioDiskDevice : VirtioDevice
{
    /// <summary>Pushed buffers after which the driver is told, within one round of work.</summary>
    private const int NotifyBatch = 16;

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
        int pushed = 0;
        // A request that ends at once leaves its object and its hold to the next one.
        VirtioDiskRequest? request = null;
        try
        {
            while (queue.Pop() is { } element)
            {
                if (request is null)
                {
                    request = Take();
                    HoldAgain();
                }
                if (!request.Serve(element))
                {
                    request = null;
                    continue;
                }
                request.Answer();
                if (++pushed % NotifyBatch == 0)
                    queue.Notify();
            }
            queue.Notify();
        }
        finally
        {
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

    /// <summary>Understands a buffer and begins.</summary>
    /// <returns>Whether it has ended already, and <see cref="Answer"/> is to be called.</returns>
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
        Virtqueue queue = Element!.Queue;
        Answer();
        queue.Notify();
        device.Give(this);
        device.Release();
    }

    /// <summary>Gives the buffer back, without telling the driver yet.</summary>
    public void Answer()
    {
        VirtqueueElement element = Element!;
        Element = null;
        element.Queue.Push(element, WriteAnswer(element));
        Left();
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
