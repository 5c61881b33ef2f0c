using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Core;

namespace Kvasir.Machine.Tests;

/// <summary>A board of scripted vCPUs that counts what the machine does to it.</summary>
internal sealed class ScriptedBoard : IBoard
{
    private readonly ScriptedVcpu[] _vcpus;

    public ScriptedBoard(IPowerControl power, int cpus)
    {
        Power = power;
        _vcpus = [.. Enumerable.Range(0, cpus).Select(index => new ScriptedVcpu(index))];
    }

    public IPowerControl Power { get; }

    public VmClock Clock { get; } = new();

    public IReadOnlyList<IVcpu> Vcpus => _vcpus;

    public int Resets { get; private set; }

    public bool VcpuRanDuringReset { get; private set; }

    public int ButtonPresses { get; private set; }

    public bool Disposed { get; private set; }

    public Action? OnReset { get; set; }

    public ScriptedVcpu this[int index] => _vcpus[index];

    public void Reset()
    {
        Resets++;
        VcpuRanDuringReset |= _vcpus.Any(vcpu => vcpu.Running);
        OnReset?.Invoke();
    }

    public List<string> Steps { get; } = [];

    public void Pause() => Steps.Add("pause");

    public void Resume() => Steps.Add("resume");

    public bool ButtonHeard { get; set; } = true;

    public bool PressPowerButton()
    {
        ButtonPresses++;
        return ButtonHeard;
    }

    public void Dispose()
    {
        Disposed = true;
        Clock.Dispose();
    }
}
