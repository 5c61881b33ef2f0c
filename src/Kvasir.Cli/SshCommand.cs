using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using Kvasir.Cli.Guests;

namespace Kvasir.Cli;

/// <summary>How to reach a VM's SSH server from the host.</summary>
internal sealed record SshDoor(int Port, string User)
{
    private const string FileName = "ssh";

    /// <summary>Leaves it in the VM's run folder.</summary>
    public void Write(string runFolder) => File.WriteAllText(Path.Combine(runFolder, FileName), string.Create(CultureInfo.InvariantCulture, $"{Port} {User}\n"));

    /// <exception cref="CommandException">No such VM runs, or it has no door.</exception>
    public static SshDoor Find(string vm)
    {
        string folder = Path.Combine(UserFolders.Runtime, vm);
        string path = Path.Combine(folder, FileName);
        try
        {
            string[] words = File.ReadAllText(path).Split(' ', StringSplitOptions.TrimEntries);
            return new SshDoor(int.Parse(words[0], CultureInfo.InvariantCulture), words[1]);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or FormatException or IndexOutOfRangeException)
        {
            throw new CommandException(
                ExitCode.HostTrouble,
                Directory.Exists(folder)
                    ? $"the VM '{vm}' has no way in for SSH: it is no named guest, or its --net is no user network"
                    : $"no VM named '{vm}' runs; 'kvasir run debian --name {vm}' starts one");
        }
    }
}

/// <summary><c>kvasir ssh NAME [COMMAND...]</c>: the host's ssh with the VM's port, key and host key. Its exit code is ours.</summary>
internal static class SshCommand
{
    public static int Execute(string vm, IReadOnlyList<string> command)
    {
        SshDoor door = SshDoor.Find(vm);
        if (HostPrograms.Find("ssh") is not { } program)
            throw new CommandException(ExitCode.HostTrouble, "kvasir ssh needs the host's ssh: install the package openssh-client");
        List<string> arguments =
        [
            "-p", door.Port.ToString(CultureInfo.InvariantCulture), "-o", "StrictHostKeyChecking=accept-new", "-o", $"HostKeyAlias=kvasir-{vm}",
            "-o", $"UserKnownHostsFile=\"{Path.Combine(NamedGuest.FolderOf(vm), "known_hosts")}\"", "-o", "LogLevel=ERROR",
        ];
        if (SshKeys.Own() is { } key)
            arguments.AddRange(["-i", key.Path]);
        arguments.Add($"{door.User}@127.0.0.1");
        arguments.AddRange(command);
        // Ctrl-C is for the command at the other end.
        Console.CancelKeyPress += (_, e) => e.Cancel = true;
        try
        {
            using Process process = Process.Start(new ProcessStartInfo(program, arguments))!;
            process.WaitForExit();
            return process.ExitCode;
        }
        catch (Win32Exception e)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot run ssh: {e.Message}", e);
        }
    }
}
