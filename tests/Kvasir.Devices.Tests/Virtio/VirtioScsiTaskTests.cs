using System;
using System.Buffers.Binary;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <content>Task management: what it stops, when it is complete, and what it says of itself.</content>
public sealed partial class VirtioScsiTests
{
    private const ulong FirstTask = 0xc0_0000;
    private const ulong FirstFunction = 0xd0_0000;

    private int _functions;

    /// <summary>Begins a read of a block under a tag, with buffers of its own, and waits for nothing.</summary>
    private void BeginRead(byte tag, uint block)
    {
        ulong at = FirstTask + tag * 0x1000ul;
        byte[] header = new byte[51];
        header[0] = 1;
        header[1] = 2;
        header[2] = 0x40;
        BinaryPrimitives.WriteUInt64LittleEndian(header.AsSpan(8), tag);
        Cdb10(0x28, block, 1).CopyTo(header.AsSpan(19));
        _memory.TryWrite(new Gpa(at), header);
        Assert.True(_queues[2].TryAdd([new Part(at, 51, false), new Part(at + 0x200, 108, true), new Part(at + 0x400, 512, true)], indirect: false) >= 0);
        _driver.Kick(2);
    }

    private byte TaskResponse(byte tag)
    {
        _memory.TryRead(new Gpa(FirstTask + tag * 0x1000ul + 0x200 + 11), out byte response);
        return response;
    }

    /// <summary>Asks for a management function.</summary>
    /// <returns>Where its response will be.</returns>
    private ulong BeginFunction(uint function, ulong tag = 0, byte target = 2, byte unit = 0)
    {
        ulong at = FirstFunction + (ulong)_functions++ * 0x100;
        byte[] request = new byte[24];
        BinaryPrimitives.WriteUInt32LittleEndian(request.AsSpan(4), function);
        request[8] = 1;
        request[9] = target;
        request[10] = 0x40;
        request[11] = unit;
        BinaryPrimitives.WriteUInt64LittleEndian(request.AsSpan(16), tag);
        _memory.TryWrite(new Gpa(at), request);
        _memory.TryWrite(new Gpa(at + 0x40), (byte)0xee);
        Assert.True(_queues[0].TryAdd([new Part(at, 24, false), new Part(at + 0x40, 1, true)], indirect: false) >= 0);
        _driver.Kick(0);
        return at + 0x40;
    }

    private byte FunctionResponse(ulong at)
    {
        _memory.TryRead(new Gpa(at), out byte response);
        return response;
    }

    private byte Function(uint function, ulong tag = 0, byte target = 2, byte unit = 0)
    {
        ulong at = BeginFunction(function, tag, target, unit);
        _driver.Wait(_queues[0]);
        return FunctionResponse(at);
    }

    /// <summary>Lets requests wait in the back end until the returned source is set.</summary>
    private (TaskCompletionSource Gate, Task Swap) HoldRequests()
    {
        TaskCompletionSource gate = new(TaskCreationOptions.RunContinuationsAsynchronously);
        TaskCompletionSource closed = new(TaskCreationOptions.RunContinuationsAsynchronously);
        Task swap = _disk.Backend.SwapAsync(async node =>
        {
            closed.SetResult();
            await gate.Task;
            return node;
        }).AsTask();
        closed.Task.Wait(TestContext.Current.CancellationToken);
        return (gate, swap);
    }

    [Theory]
    [InlineData(0, new byte[] { 2, 0 })]
    [InlineData(1, new byte[] { 2, 2 })]
    [InlineData(3, new byte[] { 2, 2 })]
    [InlineData(4, new byte[] { 4, 4 })]
    [InlineData(5, new byte[] { 4, 4 })]
    public async Task AFunctionIsCompleteWhenTheTasksThatItAbortsHaveEnded(uint function, byte[] responses)
    {
        await AttachAsync();
        ClearAttention();
        (TaskCompletionSource gate, Task swap) = HoldRequests();
        BeginRead(7, 1);
        BeginRead(8, 2);
        // The request queue's work comes before the control queue's, or the question would be answered with 0.
        Assert.True(SpinWait.SpinUntil(() => Function(6, 7) == 10 && Function(6, 8) == 10, 120_000));
        ulong abort = BeginFunction(function, 7);
        // Asked later and answered first: the tasks are still there, and so the function is not complete.
        Assert.Equal(10, Function(6, 7));
        Assert.Equal(0xee, FunctionResponse(abort));
        Assert.False(_queues[2].TryTake(out int _, out uint _));
        gate.SetResult();
        await swap;
        _driver.Wait(_queues[0]);
        Assert.Equal(0, FunctionResponse(abort));
        _driver.Wait(_queues[2]);
        _driver.Wait(_queues[2]);
        Assert.Equal((responses[0], responses[1]), (TaskResponse(7), TaskResponse(8)));
        Assert.Equal(0, Function(7));
        // The unit goes on; after a reset it says so first.
        Answer ready = Execute([0x00, 0, 0, 0, 0, 0]);
        Assert.Equal(function >= 4 ? (2, 6, 0x29) : (0, 0, 0), (ready.Status, ready.Status == 0 ? 0 : ready.Key, ready.Status == 0 ? 0 : ready.Code));
        Assert.Equal((byte)9, Execute(Cdb10(0x28, 9, 1), 512).Data[0]);
    }

    [Fact]
    public async Task AUnitLeavesWhenNothingUsesItsDiskAnyMore()
    {
        await AttachAsync();
        ClearAttention();
        (TaskCompletionSource gate, Task swap) = HoldRequests();
        BeginRead(7, 1);
        Assert.True(SpinWait.SpinUntil(() => Function(6, 7) == 10, 120_000));
        Thread detach = new(() => _device.Detach(_unit!)) { IsBackground = true };
        detach.Start();
        // Who asks from now on finds nothing, and the disk is still in use.
        bool gone = SpinWait.SpinUntil(() => _device.Units.Count == 0, 120_000);
        byte response = Execute([0x00, 0, 0, 0, 0, 0]).Response;
        bool early = detach.Join(20);
        gate.SetResult();
        await swap;
        Assert.True(gone);
        Assert.Equal(3, response);
        Assert.False(early);
        Assert.True(detach.Join(120_000));
        _driver.Wait(_queues[2]);
        Assert.Equal(0, TaskResponse(7));
    }

    [Fact]
    public async Task ATaskThatWaitsForTheVmIsAbortedAtOnce()
    {
        int pauses = 0;
        await AttachAsync(pause: _ => Interlocked.Increment(ref pauses));
        ClearAttention();
        _disk.Faults.Add(new FaultRule(FaultKind.Read));
        BeginRead(3, 1);
        BeginRead(4, 2);
        // A request is kept before the VM is paused for it.
        Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref pauses) == 2, 120_000));
        Assert.Equal(2, _unit!.Disk.Kept);
        Assert.Equal(0, Function(0, 4));
        _driver.Wait(_queues[2]);
        Assert.Equal((2, 1), (TaskResponse(4), _unit.Disk.Kept));
        Assert.Equal(0, Function(5));
        _driver.Wait(_queues[2]);
        Assert.Equal((4, 0), (TaskResponse(3), _unit.Disk.Kept));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task ARestoredDeviceAnswersWhatTheSavedOneHeld(bool unitLeft)
    {
        int pauses = 0;
        await AttachAsync(pause: _ => Interlocked.Increment(ref pauses));
        ClearAttention();
        _disk.Faults.Add(new FaultRule(FaultKind.Read));
        BeginRead(3, 1);
        Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref pauses) == 1, 120_000));
        _device.Pause();
        if (unitLeft)
            _device.Detach(_unit!);
        VirtioDevice.State saved = _device.Save();
        Assert.Equal(2, Assert.Single(saved.Held).Queue);
        _disk.Faults.Clear();
        using VirtioScsi second = new("second", _memory);
        if (!unitLeft)
            second.Attach(new ScsiUnit(new Disk(_disk.Backend, new DiskSettings { Name = "unit" }), 2, 0));
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        second.Resume();
        other.Wait(_queues[2]);
        Assert.Equal(unitLeft ? 3 : 0, TaskResponse(3));
    }

    /// <summary>What an initiator has not heard of a unit, and events for which it gave no buffers, it hears from the restored device: once.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task ARestoredDeviceTellsWhatTheSavedOneHadToTell(bool told)
    {
        const ulong events = 0xb0_0000;
        await AttachAsync();
        ClearAttention();
        await _disk.Backend.ResizeAsync(2 * Blocks * 512, TestContext.Current.CancellationToken);
        if (told)
            ClearAttention();
        _device.Pause();
        VirtioDevice.State saved = _device.Save();
        using VirtioScsi second = new("second", _memory);
        second.Attach(new ScsiUnit(new Disk(_disk.Backend, new DiskSettings { Name = "unit" }), 2, 0));
        second.Pause();
        second.Restore(saved);
        VirtioScsi.ScsiState state = Assert.IsType<VirtioScsi.ScsiState>(second.Save().Model);
        Assert.Equal(new VirtioScsi.UnitState(2, 0, (byte)(told ? 0 : 6), (byte)(told ? 0 : 0x2a), (byte)(told ? 0 : 9)), Assert.Single(state.Units));
        // The unit that came, and the size that changed.
        Assert.Equal(2, state.Events.Length);
        second.Restore(saved with { Model = state with { Missed = told } });
        second.Resume();
        _driver = new ModelDriver(second, _memory);
        Answer first = Execute([0x00, 0, 0, 0, 0, 0]);
        Assert.Equal(told ? (0, 0) : (2, 0x2a), (first.Status, first.Code));
        Assert.Equal(0, Execute([0x00, 0, 0, 0, 0, 0]).Status);
        for (int i = 0; i < 3; i++)
            _queues[1].TryAdd([new Part(events + (ulong)i * 64, 16, true)], indirect: false);
        _driver.Kick(1);
        foreach ((uint kind, uint reason) in new[] { (told ? 0x8000_0001u : 1u, 1u), (3u, 0x92au) })
        {
            ulong at = events + (ulong)_driver.Wait(_queues[1]).Id * 64;
            _memory.TryRead(new Gpa(at), out uint foundKind);
            _memory.TryRead(new Gpa(at + 12), out uint foundReason);
            Assert.Equal((kind, reason), (foundKind, foundReason));
        }
        second.Pause();
        Assert.False(_queues[1].TryTake(out int _, out uint _));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task AUnitThatLeavesAPausedVmHasItsRequestsAnsweredWhenItGoesOn(bool reset)
    {
        int pauses = 0;
        await AttachAsync(pause: _ => Interlocked.Increment(ref pauses));
        ClearAttention();
        _disk.Faults.Add(new FaultRule(FaultKind.Read));
        _memory.TryWrite(new Gpa(FirstTask + 3 * 0x1000 + 0x200), Enumerable.Repeat((byte)0xee, 108).ToArray());
        BeginRead(3, 1);
        Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref pauses) == 1, 120_000));
        _device.Pause();
        _device.Detach(_unit!);
        // The disk may be closed now, and the guest's memory is at rest.
        Assert.Equal(0, _unit!.Disk.Kept);
        Assert.False(_queues[2].TryTake(out int _, out uint _));
        Assert.Equal(0xee, TaskResponse(3));
        ModelQueue[] queues = reset ? _driver.Start(All, 64, Rings) : _queues;
        _device.Resume();
        if (!reset)
        {
            _driver.Wait(_queues[2]);
            _memory.TryRead(new Gpa(FirstTask + 3 * 0x1000 + 0x200 + 10), out byte status);
            _memory.TryRead(new Gpa(FirstTask + 3 * 0x1000 + 0x200 + 24), out byte code);
            // CHECK CONDITION: LOGICAL UNIT NOT SUPPORTED.
            Assert.Equal((2, 0x25, 0), (status, code, TaskResponse(3)));
        }
        queues.CopyTo(_queues, 0);
        // The device goes on, and an old request is not answered in a new ring.
        Assert.Equal(3, Execute([0x00, 0, 0, 0, 0, 0]).Response);
        Assert.False(_queues[2].TryTake(out int _, out uint _));
        Assert.Equal(reset ? 0xee : 0, TaskResponse(3));
    }

    [Fact]
    public async Task FunctionsSayWhatTheyCannotDo()
    {
        await AttachAsync();
        Assert.Equal(3, Function(5, target: 9));
        Assert.Equal(12, Function(5, unit: 9));
        Assert.Equal(3, Function(4, target: 9));
        Assert.Equal(11, Function(77));
        // No such task: it has ended already.
        Assert.Equal(0, Function(0, 1234));
        Assert.Equal(0, Function(6, 1234));
    }
}
