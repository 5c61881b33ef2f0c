using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <content>
/// Task management (virtio 1.2, 5.6.6.2; SAM-5, ch. 7). What the host does already cannot be called back: a request that is aborted does no further piece of its work
/// and is answered as aborted, and the function is complete when the last such request has let go of its buffer.
/// </content>
public sealed partial class VirtioScsi
{
    private enum TaskFunction : uint
    {
        AbortTask = 0,
        AbortTaskSet = 1,
        ClearAca = 2,
        ClearTaskSet = 3,
        NexusReset = 4,
        UnitReset = 5,
        QueryTask = 6,
        QueryTaskSet = 7,
    }

    /// <summary>A management function that waits for the requests that it aborted.</summary>
    private sealed class Abortion(Virtqueue queue, VirtqueueElement element)
    {
        /// <summary>Requests that have not ended, and one for the function itself.</summary>
        private int _left = 1;

        public void Add() => Interlocked.Increment(ref _left);

        /// <summary>Answers after the last one.</summary>
        /// <returns>Whether this was it; the caller lets go of the function's hold then.</returns>
        public bool Remove()
        {
            if (Interlocked.Decrement(ref _left) > 0)
                return false;
            queue.Complete(element, (uint)element.Write(0, [(byte)Response.Ok]));
            return true;
        }
    }

    /// <summary>A request as task management sees it. Its fields change under its lock, which is the last in the order.</summary>
    private sealed class TaskState
    {
        private readonly Lock _lock = new();
        private ScsiUnit? _unit;
        private ulong _tag;
        private volatile Abortion? _abortion;

        public bool IsAborted => _abortion is not null;

        /// <summary>By the reset of its unit, not by a function for tasks.</summary>
        public bool ByReset { get; private set; }

        /// <summary>Called with the function's hold when the request that it waited for last has ended.</summary>
        public Action? FunctionEnded { get; set; }

        public void Begin(ScsiUnit unit, ulong tag)
        {
            lock (_lock)
                (_unit, _tag) = (unit, tag);
        }

        public void End()
        {
            Abortion? abortion;
            lock (_lock)
            {
                abortion = _abortion;
                _abortion = null;
                _unit = null;
            }
            if (abortion is not null && abortion.Remove())
                FunctionEnded?.Invoke();
        }

        /// <param name="tag">The task's; null: of any.</param>
        public bool IsOf(ScsiUnit unit, ulong? tag)
        {
            lock (_lock)
                return _unit == unit && (tag is null || _tag == tag);
        }

        public bool TryAbort(ScsiUnit unit, ulong? tag, bool reset, Abortion abortion)
        {
            lock (_lock)
            {
                if (_unit != unit || (tag is not null && _tag != tag) || _abortion is not null)
                    return false;
                ByReset = reset;
                abortion.Add();
                _abortion = abortion;
                return true;
            }
        }
    }

    private readonly Lock _tracking = new();
    private volatile Request[] _requests = [];

    private Request Track(Request request)
    {
        request.Task.FunctionEnded = Release;
        lock (_tracking)
            _requests = [.. _requests, request];
        return request;
    }

    /// <summary>Task management and asynchronous notification requests.</summary>
    private void Control(Virtqueue queue, VirtqueueElement element)
    {
        const uint taskManagement = 0;
        Span<byte> request = stackalloc byte[24];
        request.Clear();
        int length = element.Read(0, request);
        if (length < 16 || element.WritableLength < 1)
        {
            Fail("a control request that is too short");
            queue.Forget(element);
            return;
        }
        if (BinaryPrimitives.ReadUInt32LittleEndian(request) != taskManagement)
        {
            // Nothing is announced asynchronously: the bits asked for stay zero.
            queue.Push(element, (uint)element.Write(0, [0, 0, 0, 0, (byte)Response.Ok]));
            return;
        }
        TaskFunction function = (TaskFunction)BinaryPrimitives.ReadUInt32LittleEndian(request[4..]);
        ulong tag = BinaryPrimitives.ReadUInt64LittleEndian(request[16..]);
        ScsiUnit? unit = Find(request.Slice(8, 8), out bool targetExists);
        bool target = function == TaskFunction.NexusReset;
        if (target ? !targetExists : unit is null)
        {
            Answer(targetExists ? Response.IncorrectUnit : Response.BadTarget);
            return;
        }
        switch (function)
        {
            case TaskFunction.AbortTask:
                Abort(queue, element, [unit!], tag, reset: false);
                break;
            case TaskFunction.AbortTaskSet or TaskFunction.ClearTaskSet:
                Abort(queue, element, [unit!], null, reset: false);
                break;
            case TaskFunction.UnitReset:
                Abort(queue, element, [unit!], null, reset: true);
                break;
            case TaskFunction.NexusReset:
                byte number = request[9];
                Abort(queue, element, Array.FindAll(_attached, other => other.Target == number), null, reset: true);
                break;
            case TaskFunction.QueryTask:
                Answer(Array.Exists(_requests, task => task.Task.IsOf(unit!, tag)) ? Response.FunctionSucceeded : Response.Ok);
                break;
            case TaskFunction.QueryTaskSet:
                Answer(Array.Exists(_requests, task => task.Task.IsOf(unit!, null)) ? Response.FunctionSucceeded : Response.Ok);
                break;
            case TaskFunction.ClearAca:
                // No unit ever has an ACA condition: NACA is not offered.
                Answer(Response.Ok);
                break;
            default:
                Answer(Response.FunctionRejected);
                break;
        }

        void Answer(Response response) => queue.Push(element, (uint)element.Write(0, [(byte)response]));
    }

    private void Abort(Virtqueue queue, VirtqueueElement element, ReadOnlySpan<ScsiUnit> units, ulong? tag, bool reset)
    {
        Abortion abortion = new(queue, element);
        HoldAgain();
        foreach (ScsiUnit unit in units)
        {
            foreach (Request request in _requests)
                _ = request.Task.TryAbort(unit, tag, reset, abortion);
            // Those that wait for the VM to go on wait no more.
            foreach (DiskRequest kept in unit.Disk.TakeKept(request => ((Request)request).Task.IsAborted))
            {
                HoldAgain();
                ((Request)kept).Finish();
            }
            if (reset)
                unit.Reset();
        }
        if (abortion.Remove())
            Release();
    }
}
