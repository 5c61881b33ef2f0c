using System;

namespace Kvasir.Cli;

/// <summary>How the command ends. Values are part of the interface; isa-debug-exit adds <c>(value &lt;&lt; 1) | 1</c> of its own.</summary>
internal enum ExitCode
{
    Success = 0,

    /// <summary>The host lacks something or an operation on it failed.</summary>
    HostTrouble = 1,

    /// <summary>Bad usage or configuration.</summary>
    Usage = 2,

    /// <summary>The guest crashed (triple fault).</summary>
    GuestCrash = 3,
}

/// <summary>The command cannot go on: one line that says what, why, and what to do about it, and how the process ends.</summary>
internal sealed class CommandException : Exception
{
    public CommandException(ExitCode exitCode, string message)
        : base(message) => ExitCode = exitCode;

    public CommandException(ExitCode exitCode, string message, Exception inner)
        : base(message, inner) => ExitCode = exitCode;

    public ExitCode ExitCode { get; }
}
