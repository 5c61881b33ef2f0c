using System;

namespace Kvasir.Network;

/// <summary>A network cannot be made or changed as asked: one line that says what, why, and what to do about it.</summary>
public sealed class NetworkException : Exception
{
    public NetworkException()
    {
    }

    public NetworkException(string message)
        : base(message)
    {
    }

    public NetworkException(string message, Exception innerException)
        : base(message, innerException)
    {
    }
}
