using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Machine.Tests;

/// <summary>A vCPU whose "instructions" are call-backs that the test hands it; it halts while it has none.</summary>
internal sealed class ScriptedVcpu(int index) : IVcpu
{
    private readonly object _lock = new();
    private readonly Queue<Func<VcpuExit?>> _steps = new();
    private bool _kicked;
    private int _running;

    public int Index => index;

    public string FailureReport => $"report of vCPU {index}";

    public ulong InstructionsRetired { get; private set; }

    public bool Disposed { get; private set; }

    /// <summary>Whether <see cref="Run"/> is under way.</summary>
    public bool Running => Volatile.Read(ref _running) != 0;

    public string? ThreadName { get; private set; }

    public void Execute(Action step) => Execute(() =>
    {
        step();
        return null;
    });

    public void Execute(Func<VcpuExit?> step)
    {
        lock (_lock)
        {
            _steps.Enqueue(step);
            Monitor.PulseAll(_lock);
        }
    }

    public VcpuExit Run()
    {
        ThreadName = Thread.CurrentThread.Name;
        Volatile.Write(ref _running, 1);
        try
        {
            while (true)
            {
                Func<VcpuExit?> step;
                lock (_lock)
                {
                    while (!_kicked && _steps.Count == 0)
                        Monitor.Wait(_lock);
                    if (_kicked)
                    {
                        _kicked = false;
                        return VcpuExit.Kicked;
                    }
                    step = _steps.Dequeue();
                }
                InstructionsRetired++;
                if (step() is { } exit)
                    return exit;
            }
        }
        finally
        {
            Volatile.Write(ref _running, 0);
        }
    }

    public void Kick()
    {
        lock (_lock)
        {
            _kicked = true;
            Monitor.PulseAll(_lock);
        }
    }

    public void GetState(out CpuState state) => state = CpuState.AtReset();

    public void SetState(in CpuState state)
    {
    }

    public void InterruptChanged()
    {
    }

    public void Nmi()
    {
    }

    public void Init()
    {
    }

    public void Sipi(byte vector)
    {
    }

    public void Smi()
    {
    }

    public void Dispose() => Disposed = true;
}
