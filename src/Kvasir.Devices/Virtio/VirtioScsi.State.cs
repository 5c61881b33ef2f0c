using System;
using System.Collections.Generic;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <content>What a saved state has of units, and of news that wait for the driver's buffers.</content>
public sealed partial class VirtioScsi
{
    /// <summary>A logical unit, and the unit attention that its initiator has not been told (SAM-5, 5.14): a key of 0: none.</summary>
    public readonly record struct UnitState(int Target, int Unit, byte Key, byte Code, byte Qualifier);

    /// <summary>An event that waits (virtio 1.2, 5.6.6.3).</summary>
    public readonly record struct EventState(uint Kind, ulong Unit, uint Reason);

    /// <param name="Missed">There were more events than are kept.</param>
    public sealed record ScsiState(UnitState[] Units, EventState[] Events, bool Missed) : ModelState;

    /// <summary>Events that are kept for a driver that gives no buffers.</summary>
    private const int MostEvents = 64;

    protected override ModelState SaveModel()
    {
        UnitState[] units = Array.ConvertAll(_attached, unit => new UnitState(unit.Target, unit.Unit, unit.Pending.Key, unit.Pending.Code, unit.Pending.Qualifier));
        lock (_events)
            return new ScsiState(units, Array.ConvertAll(_events.ToArray(), item => new EventState((uint)item.Kind, item.Unit, item.Reason)), _missed);
    }

    protected override string? CheckModel(ModelState? model)
    {
        if (model is not ScsiState { Units: { } units, Events: { } events })
            return "it is not a SCSI host's";
        HashSet<(int, int)> seen = [];
        foreach (UnitState unit in units)
        {
            if (!seen.Add((unit.Target, unit.Unit)))
                return $"unit {unit.Unit} of target {unit.Target} is in it twice";
            if (Find(unit.Target, unit.Unit) is null)
                return $"there is no unit {unit.Unit} at target {unit.Target} here";
        }
        foreach (ScsiUnit unit in _attached)
        {
            if (!seen.Contains((unit.Target, unit.Unit)))
                return $"unit {unit.Unit} of target {unit.Target} is not in it";
        }
        if (events.Length > MostEvents)
            return $"{events.Length} events wait";
        foreach (EventState item in events)
        {
            if ((EventKind)item.Kind is not (EventKind.TransportReset or EventKind.ParameterChange))
                return $"there is no event {item.Kind:x}";
        }
        return null;
    }

    protected override void RestoreModel(ModelState? model)
    {
        ScsiState state = (ScsiState)model!;
        foreach (UnitState unit in state.Units)
            Find(unit.Target, unit.Unit)!.Pending = new ScsiSense(unit.Key, unit.Code, unit.Qualifier);
        lock (_events)
        {
            _events.Clear();
            foreach (EventState item in state.Events)
                _events.Enqueue(new Event((EventKind)item.Kind, item.Unit, item.Reason));
            _missed = state.Missed;
        }
    }
}
