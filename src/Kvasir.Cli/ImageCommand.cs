using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using Kvasir.Cli.Guests;
using Kvasir.Cli.Options;
using Kvasir.Linux;

namespace Kvasir.Cli;

/// <summary><c>kvasir image list|build|rm</c>: the guests that are known by name, and the disks of their VMs.</summary>
internal static class ImageCommand
{
    public static int List()
    {
        Console.Out.WriteLine($"{"IMAGE",-10} {"STATE",-11} {"SIZE",8}  WHAT");
        string folder = GuestFolder.PathOf(DebianGuest.FolderName);
        Console.Out.WriteLine($"{DebianGuest.Name,-10} {(DebianGuest.IsBuilt ? "built" : "not built"),-11} {(DebianGuest.IsBuilt ? Size(FolderBytes(folder)) : "-"),8}  Debian 12 for servers: systemd, SSH server, user debian");
        List<(string Name, string Base, long Bytes)> vms = [.. NamedGuest.All()];
        if (vms.Count == 0)
            return 0;
        Console.Out.WriteLine($"\n{"VM",-22} {"DISK",8}  OVER");
        foreach ((string name, string origin, long bytes) in vms)
            Console.Out.WriteLine($"{name,-22} {Size(bytes),8}  {origin.Split(' ')[0]}");
        return 0;
    }

    public static int Build(string name)
    {
        CheckName(name);
        BaseImage image = GuestProgress.Show(name, DebianGuest.Get);
        Console.Out.WriteLine(image.Disk);
        return 0;
    }

    /// <summary>Removes an image that no VM has its disk over, or a VM's disk and what else it keeps.</summary>
    public static int Remove(string? image, string? vm)
    {
        if (image is null == vm is null)
            throw new CommandException(ExitCode.Usage, "image rm: name an image, or a VM's disk with --vm NAME");
        if (vm is not null)
        {
            RunPlanner.ParseName(vm);
            string kept = NamedGuest.FolderOf(vm);
            if (!Directory.Exists(kept))
                throw new CommandException(ExitCode.Usage, $"image rm: there is no VM '{vm}' with a disk of its own");
            // The name is held meanwhile: a VM that runs keeps its disk.
            using RunFolder held = RunFolder.Take(vm);
            Delete(kept);
            return 0;
        }
        CheckName(image!);
        if (!DebianGuest.IsBuilt)
            throw new CommandException(ExitCode.Usage, $"image rm: {image} is not built");
        string[] users = [.. NamedGuest.All().Select(user => user.Name)];
        if (users.Length > 0)
            throw new CommandException(ExitCode.Usage, $"image rm: the disks of {string.Join(", ", users)} are over {image}; 'kvasir image rm --vm NAME' removes one");
        Delete(GuestFolder.PathOf(DebianGuest.FolderName));
        return 0;
    }

    private static void CheckName(string name)
    {
        if (name != DebianGuest.Name)
            throw new CommandException(ExitCode.Usage, $"there is no image '{name}' to build; there is {DebianGuest.Name}");
    }

    private static void Delete(string folder)
    {
        try
        {
            Directory.Delete(folder, recursive: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot remove {folder}: {e.Message}", e);
        }
    }

    private static long FolderBytes(string folder)
    {
        long bytes = 0;
        foreach (string path in Directory.EnumerateFiles(folder))
        {
            using Microsoft.Win32.SafeHandles.SafeFileHandle file = File.OpenHandle(path);
            bytes += Math.Max(0, NativeFile.AllocatedBytes(file));
        }
        return bytes;
    }

    private static string Size(long bytes) => string.Create(CultureInfo.InvariantCulture, $"{bytes / 1048576.0:0} MiB");
}
