using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using Kvasir.Block;
using Kvasir.Cli.Options;
using Kvasir.Linux;
using Kvasir.Network.User;

namespace Kvasir.Cli.Guests;

/// <summary>What a VM takes from the seed options of <c>kvasir run</c>.</summary>
internal sealed record SeedOptions
{
    public IReadOnlyList<string> SshKeys { get; init; } = [];

    public string? UserData { get; init; }

    public string? HostName { get; init; }

    public bool Any => SshKeys.Count > 0 || UserData is not null || HostName is not null;
}

/// <summary>One VM of a named guest: its own disk over the shared image, its seed, and the port of the host that leads to its SSH server.</summary>
internal static class NamedGuest
{
    private const string DiskName = "disk.qcow2";
    private const string SeedName = "seed.iso";
    private const string BaseName = "base";

    /// <summary>A VM's lasting folder.</summary>
    public static string FolderOf(string vm) => Path.Combine(UserFolders.Data, "vms", vm);

    /// <summary>VMs that have a disk over an image.</summary>
    public static IEnumerable<(string Name, string Base, long Bytes)> All()
    {
        string root = Path.Combine(UserFolders.Data, "vms");
        if (!Directory.Exists(root))
            yield break;
        foreach (string folder in Directory.EnumerateDirectories(root).Order(StringComparer.Ordinal))
        {
            string origin = Path.Combine(folder, BaseName);
            string disk = Path.Combine(folder, DiskName);
            if (File.Exists(origin) && File.Exists(disk))
                yield return (Path.GetFileName(folder), File.ReadAllText(origin).Trim(), AllocatedBytes(disk));
        }
    }

    /// <summary>Adds to a plan what the guest debian is made of. The VM's name must be held.</summary>
    /// <exception cref="CommandException">The guest cannot be built, or its disk not be used.</exception>
    public static RunPlan Prepare(RunPlan plan, SeedOptions seed, long? size)
    {
        BaseImage image = GuestProgress.Show("debian", DebianGuest.Get);
        string vm = plan.Configuration.Name;
        string folder = FolderOf(vm);
        string append = plan.Configuration.KernelCommandLine;
        try
        {
            UserFolders.MakePrivate(folder);
            string disk = Path.Combine(folder, DiskName);
            PrepareDisk(vm, folder, disk, image, size);
            string seedPath = WriteSeed(vm, folder, seed);
            (IReadOnlyList<NetSetting>? networks, int? port) = WithSshForward(plan.Networks);
            return plan with
            {
                Networks = networks,
                Ssh = port is { } found ? new SshDoor(found, DebianGuest.User) : null,
                Configuration = plan.Configuration with
                {
                    Kernel = image.Kernel,
                    InitialRamdisk = image.InitialRamdisk,
                    KernelCommandLine = append.Length == 0 ? DebianGuest.KernelCommandLine : $"{DebianGuest.KernelCommandLine} {append}",
                    Memory = plan.NamesMemory ? plan.Configuration.Memory : DebianGuest.DefaultMemory,
                    // Its disk is the first, as the kernel is told.
                    Disks = [DiskOption.Parse($"{Escape(disk)},format=qcow2", 0), DiskOption.Parse($"{Escape(seedPath)},format=raw,readonly", 1), .. plan.Configuration.Disks],
                },
            };
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or LinuxException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot prepare the VM {vm} in {folder}: {e.Message}", e);
        }
    }

    /// <summary>Adds a seed disk to a plan whose image is the user's own.</summary>
    public static RunPlan WithSeed(RunPlan plan, SeedOptions seed)
    {
        string vm = plan.Configuration.Name;
        string folder = FolderOf(vm);
        UserFolders.MakePrivate(folder);
        try
        {
            string path = WriteSeed(vm, folder, seed);
            List<Kvasir.Machine.DiskConfiguration> disks = [.. plan.Configuration.Disks];
            disks.Add(DiskOption.Parse($"{Escape(path)},format=raw,readonly", disks.Count));
            return plan with { Configuration = plan.Configuration with { Disks = disks } };
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot write the seed disk in {folder}: {e.Message}", e);
        }
    }

    /// <summary>Doubles the commas of a path, as options want it.</summary>
    public static string Escape(string path) => path.Replace(",", ",,", StringComparison.Ordinal);

    private static void PrepareDisk(string vm, string folder, string disk, BaseImage image, long? size)
    {
        string origin = Path.Combine(folder, BaseName);
        string identity = image.Identity;
        if (File.Exists(disk))
        {
            string made = File.Exists(origin) ? File.ReadAllText(origin).Trim() : "";
            if (made != identity)
                throw new CommandException(ExitCode.HostTrouble, $"the disk of '{vm}' was made over another build of the guest ({made}), and this one is {identity}: 'kvasir image rm --vm {vm}' throws the disk away, or choose another --name");
            if (size is { } wanted)
                Grow(vm, disk, wanted).GetAwaiter().GetResult();
            return;
        }
        if (size < DebianGuest.BaseSize)
            throw new CommandException(ExitCode.Usage, $"--size: the guest's disk has {MemorySize.Format((ulong)DebianGuest.BaseSize)} at least");
        // The name appears with the whole image.
        string temporary = disk + ".tmp";
        File.Delete(temporary);
        Create(temporary, image.Disk, size ?? DebianGuest.BaseSize).GetAwaiter().GetResult();
        File.WriteAllText(origin, identity + "\n");
        File.Move(temporary, disk);
        Durability.SyncFolder(folder);
    }

    private static async System.Threading.Tasks.Task Create(string path, string backing, long size)
    {
        try
        {
            ImageOptions options = new() { ["backing_file"] = backing, ["backing_fmt"] = "qcow2" };
            await using BlockNode node = await ImageCreator.CreateAsync("qcow2", path, size, options, new Dictionary<string, ReadOnlyMemory<byte>>()).ConfigureAwait(false);
            await node.FlushAsync().ConfigureAwait(false);
        }
        catch (BlockException e)
        {
            throw new IOException(e.Message, e);
        }
    }

    private static async System.Threading.Tasks.Task Grow(string vm, string disk, long size)
    {
        try
        {
            await using BlockNode node = await Image.OpenAsync(disk, new OpenOptions { Format = "qcow2", ReadOnly = false }).ConfigureAwait(false);
            if (size < node.Length)
                throw new CommandException(ExitCode.Usage, $"--size: the disk of '{vm}' has {MemorySize.Format((ulong)node.Length)} and cannot shrink");
            if (size > node.Length)
                await node.ResizeAsync(size).ConfigureAwait(false);
            await node.FlushAsync().ConfigureAwait(false);
        }
        catch (BlockException e)
        {
            throw new IOException(e.Message, e);
        }
    }

    private static string WriteSeed(string vm, string folder, SeedOptions options)
    {
        List<string> keys = [.. options.SshKeys.SelectMany(SeedDisk.ReadKeys)];
        if (SshKeys.Own() is { } own)
            keys.Add(own.PublicKey);
        if (options.SshKeys.Count == 0)
            keys.AddRange(SshKeys.OfUser());
        SeedDisk seed = new()
        {
            HostName = options.HostName ?? HostNameOf(vm),
            SshKeys = [.. keys.Distinct(StringComparer.Ordinal)],
            UserData = options.UserData is { } path ? SeedDisk.ReadUserData(path) : [],
        };
        string target = Path.Combine(folder, SeedName);
        string temporary = target + ".tmp";
        File.WriteAllBytes(temporary, seed.Build());
        File.Move(temporary, target, overwrite: true);
        return target;
    }

    private static string HostNameOf(string vm)
    {
        string name = vm.Replace('_', '-').Replace('.', '-').Trim('-');
        return SeedDisk.IsHostName(name) ? name : "guest";
    }

    /// <summary>Opens a port of the host for the guest's SSH server, where a user network is the first and has none.</summary>
    private static (IReadOnlyList<NetSetting>? Networks, int? Port) WithSshForward(IReadOnlyList<NetSetting>? networks)
    {
        if (networks is null && UserNetwork.LibraryVersion is null)
            return (null, null);
        List<NetSetting> list = [.. networks ?? [NetOption.Default]];
        int index = list.FindIndex(setting => setting.User is { Ip4: true });
        if (index < 0)
            return (networks, null);
        UserNetworkSettings user = list[index].User!;
        const int ssh = 22;
        if (user.Forwards.FirstOrDefault(forward => !forward.Udp && forward.GuestPort == ssh && forward.HostAddress.AddressFamily == AddressFamily.InterNetwork) is { } given)
            return (list, given.HostPort);
        int port = FreePort();
        list[index] = list[index] with { User = user with { Forwards = [.. user.Forwards, new PortForward(false, IPAddress.Loopback, port, IPAddress.Any, ssh)] } };
        return (list, port);
    }

    private static int FreePort()
    {
        using TcpListener probe = new(IPAddress.Loopback, 0);
        probe.Start();
        return ((IPEndPoint)probe.LocalEndpoint).Port;
    }

    private static long AllocatedBytes(string path)
    {
        using Microsoft.Win32.SafeHandles.SafeFileHandle file = File.OpenHandle(path);
        return Math.Max(0, NativeFile.AllocatedBytes(file));
    }
}
