using System;

namespace Kvasir.Cli.Options;

/// <summary>What stands behind the guest's first serial port.</summary>
internal enum SerialKind
{
    /// <summary>The terminal, or whatever standard input and output are.</summary>
    Stdio,

    /// <summary>No serial port at all.</summary>
    None,

    /// <summary>A port whose output goes nowhere.</summary>
    Null,
    File,
    UnixSocket,
}

internal sealed record SerialSetting(SerialKind Kind, string Path = "")
{
    /// <exception cref="CommandException">The text is none of the forms.</exception>
    public static SerialSetting Parse(string text) => text switch
    {
        "stdio" => new SerialSetting(SerialKind.Stdio),
        "none" => new SerialSetting(SerialKind.None),
        "null" => new SerialSetting(SerialKind.Null),
        _ when text.StartsWith("file:", StringComparison.Ordinal) && text.Length > 5 => new SerialSetting(SerialKind.File, text[5..]),
        _ when text.StartsWith("unix:", StringComparison.Ordinal) && text.Length > 5 => new SerialSetting(SerialKind.UnixSocket, text[5..]),
        _ => throw new CommandException(ExitCode.Usage, $"--serial: '{text}' is none of stdio, none, null, file:PATH, unix:PATH"),
    };
}
