using System;

namespace Kvasir.Cpu;

/// <summary>A processor that was asked for cannot be had; the message says why and what can be.</summary>
public sealed class CpuModelException : Exception
{
    public CpuModelException()
    {
    }

    public CpuModelException(string message)
        : base(message)
    {
    }

    public CpuModelException(string message, Exception inner)
        : base(message, inner)
    {
    }
}
