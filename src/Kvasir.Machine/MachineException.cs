using System;

namespace Kvasir.Machine;

/// <summary>A machine cannot be built or started as configured: one line that says what, why, and what to do about it.</summary>
public sealed class MachineException : Exception
{
    public MachineException()
    {
    }

    public MachineException(string message)
        : base(message)
    {
    }

    public MachineException(string message, Exception innerException)
        : base(message, innerException)
    {
    }
}
