using System;

namespace Kvasir.Core;

/// <summary>A saved state is not one of the part that it is put back into, or was damaged: what does not fit. The part is as it was before.</summary>
public sealed class StateException : Exception
{
    public StateException()
    {
    }

    public StateException(string message)
        : base(message)
    {
    }

    public StateException(string message, Exception innerException)
        : base(message, innerException)
    {
    }
}
