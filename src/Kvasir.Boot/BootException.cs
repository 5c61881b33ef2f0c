using System;

namespace Kvasir.Boot;

/// <summary>
/// A kernel, initial RAM disk, module or firmware file cannot be started on this board. The message is one line for a person: what is wrong, and
/// what would help where that is known.
/// </summary>
public sealed class BootException : Exception
{
    public BootException()
    {
    }

    public BootException(string message)
        : base(message)
    {
    }

    public BootException(string message, Exception innerException)
        : base(message, innerException)
    {
    }
}
