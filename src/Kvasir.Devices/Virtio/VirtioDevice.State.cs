using System;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <content>Saved states. One that does not fit is refused before anything changes.</content>
public abstract partial class VirtioDevice
{
    private const VirtioStatus KnownStatus = VirtioStatus.Acknowledge | VirtioStatus.Driver | VirtioStatus.DriverOk | VirtioStatus.FeaturesOk
        | VirtioStatus.NeedsReset | VirtioStatus.Failed;

    /// <summary>The state of a device that is paused.</summary>
    public State Save()
    {
        ModelState? model = SaveModel();
        lock (_lock)
        {
            List<VirtqueueElement> held = [];
            CollectHeld(held);
            foreach (Virtqueue queue in _queues)
                queue.CollectHeld(held);
            VirtqueueState[] queues = new VirtqueueState[_queues.Length];
            for (int i = 0; i < queues.Length; i++)
                queues[i] = _queues[i].Setup;
            return new State(_status, _accepted, _generation, [.. _config], queues, [.. held.ConvertAll(element => element.Save())], model);
        }
    }

    /// <summary>Puts saved state back into a device that is paused, or that nothing runs on yet, after the guest's memory. What it was before is forgotten.</summary>
    /// <exception cref="StateException">The state is not one of such a device: it is as it was.</exception>
    public void Restore(in State state)
    {
        if ((Fault(state) ?? CheckModel(state.Model)) is { } fault)
            throw new StateException($"{Name}: the saved state does not fit: {fault}");
        lock (_lock)
        {
            foreach (Virtqueue queue in _queues)
                queue.Reset();
            Stopped();
            _status = state.Status;
            _accepted = state.Accepted;
            _generation = state.Generation;
            _failed = (state.Status & VirtioStatus.NeedsReset) != 0;
            state.Config.CopyTo(_config, 0);
            for (int i = 0; i < _queues.Length; i++)
                _queues[i].Restore(state.Queues[i], state.Held);
        }
        if (IsRunning)
            Started();
        RestoreModel(state.Model);
        if (!IsRunning)
            return;
        foreach (Virtqueue queue in _queues)
            StartQueue(queue);
    }

    /// <summary>The type's own state, while it is paused.</summary>
    protected virtual ModelState? SaveModel() => null;

    /// <summary>Looks whether a type's own state can be put back here. Nothing changes.</summary>
    /// <returns>What is wrong with it, or null.</returns>
    protected virtual string? CheckModel(ModelState? model) => model is null ? null : "it has parts that this type of device lacks";

    /// <summary>
    /// Puts the type's own state back, which <see cref="CheckModel"/> found sound, before the queues take part; and has configuration say what is so here,
    /// where that is not for a state to say.
    /// </summary>
    protected virtual void RestoreModel(ModelState? model)
    {
    }

    /// <summary>Names the buffers that the device holds while it is paused, in the order in which it is to take them again.</summary>
    private protected virtual void CollectHeld(List<VirtqueueElement> held)
    {
    }

    /// <summary>For <see cref="RestoreModel"/>: sets configuration that is not the saved device's but this one's. The driver is told when the VM goes on.</summary>
    protected void KeepConfig(int offset, ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            bytes.CopyTo(_initialConfig.AsSpan(offset));
            Span<byte> now = _config.AsSpan(offset, bytes.Length);
            if (bytes.SequenceEqual(now))
                return;
            bytes.CopyTo(now);
            _generation++;
            _owesConfigChange = true;
        }
    }

    private string? Fault(in State state)
    {
        if (state.Config is null || state.Queues is null || state.Held is null)
            return "it is not whole";
        if ((state.Status & ~KnownStatus) != 0)
            return $"there is no status {(byte)state.Status:x}";
        bool runs = (state.Status & VirtioStatus.DriverOk) != 0;
        bool legacy = (state.Accepted & VirtioFeatures.Version1) == 0;
        if (runs && !legacy && (state.Status & VirtioStatus.FeaturesOk) == 0)
            return "its driver runs without features";
        VirtioFeatures offered = legacy ? (VirtioFeatures)LegacyFeatures : ModernFeatures;
        if ((runs || (state.Status & VirtioStatus.FeaturesOk) != 0) && (state.Accepted & ~offered) != 0)
            return $"its driver uses features {(ulong)(state.Accepted & ~offered):x}, which are not offered here";
        if (state.Config.Length != _config.Length)
            return $"it has {state.Config.Length} bytes of configuration, and {_config.Length} are needed";
        if (state.Queues.Length != _queues.Length)
            return $"it has {state.Queues.Length} queues, and there are {_queues.Length}";
        bool live = runs && (state.Status & VirtioStatus.NeedsReset) == 0;
        for (int i = 0; i < _queues.Length; i++)
        {
            if (_queues[i].Fault(state.Queues[i], state.Accepted, runs, live) is { } fault)
                return fault;
        }
        return HeldFault(state, runs);
    }

    private string? HeldFault(in State state, bool runs)
    {
        Span<int> counts = stackalloc int[_queues.Length];
        counts.Clear();
        foreach (HeldBuffer? buffer in state.Held)
        {
            if (buffer is null || buffer.Readable is null || buffer.Writable is null)
                return "a buffer is not whole";
            if (!runs || (uint)buffer.Queue >= (uint)_queues.Length || !state.Queues[buffer.Queue].Enabled)
                return $"a buffer belongs to queue {buffer.Queue}, which does not run";
            int size = state.Queues[buffer.Queue].Size;
            if (++counts[buffer.Queue] > size)
                return $"queue {buffer.Queue} has more buffers than entries";
            bool packed = (state.Accepted & VirtioFeatures.PackedRing) != 0;
            // A packed ring's identifiers are the driver's to choose (virtio 1.2, 2.8.1); a split one's are places in its table.
            if (packed ? buffer.Entries < 1 || buffer.Entries > size : buffer.Id >= size)
                return $"a buffer of queue {buffer.Queue} has {buffer.Entries} entries and number {buffer.Id}";
            if (VirtqueueElement.Fault(Memory, buffer) is { } fault)
                return fault;
        }
        return null;
    }
}
