using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Tests;

/// <summary>A wire that remembers its level and counts its rises.</summary>
internal sealed class ProbeLine : IIrqLine
{
    private readonly Lock _lock = new();

    public bool Level { get; private set; }

    public int Rises { get; private set; }

    public void Set(bool asserted)
    {
        lock (_lock)
        {
            if (asserted && !Level)
                Rises++;
            Level = asserted;
        }
    }

    /// <summary>Rises since the last call.</summary>
    public int TakeRises()
    {
        lock (_lock)
        {
            int rises = Rises;
            Rises = 0;
            return rises;
        }
    }
}

/// <summary>A vCPU's pins that count what happens to them.</summary>
internal sealed class ProbeSignals : IVcpuSignals
{
    public int Interrupts;
    public int Nmis;
    public int Inits;
    public int Smis;
    public List<byte> Sipis { get; } = [];

    public void InterruptChanged() => Interlocked.Increment(ref Interrupts);

    public void Nmi() => Interlocked.Increment(ref Nmis);

    public void Init() => Interlocked.Increment(ref Inits);

    public void Sipi(byte vector) => Sipis.Add(vector);

    public void Smi() => Interlocked.Increment(ref Smis);
}

/// <summary>The machine's power, which only takes notes.</summary>
internal sealed class ProbePower : IPowerControl
{
    public int PowerOffs { get; private set; }

    public int Resets { get; private set; }

    public int Suspends { get; private set; }

    public int? ExitCode { get; private set; }

    public void PowerOff() => PowerOffs++;

    public void Reset() => Resets++;

    public void Exit(int code) => ExitCode = code;

    public void Suspend() => Suspends++;

    public string? PauseReason { get; private set; }

    public void Pause(string reason) => PauseReason = reason;
}
