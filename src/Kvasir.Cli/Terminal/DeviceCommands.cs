using System;
using System.Globalization;
using System.Text;
using System.Threading;
using Kvasir.Cli.Options;
using Kvasir.Machine;

namespace Kvasir.Cli.Terminal;

/// <summary>The monitor's commands for devices. Each gives the text to print.</summary>
internal static class DeviceCommands
{
    private static int _added;

    public static string Disks(IDeviceControl? devices)
    {
        StringBuilder text = new();
        foreach (DiskStatus disk in devices?.Disks ?? [])
        {
            text.Append(CultureInfo.InvariantCulture, $"{disk.Name}: {disk.Path}, {MemorySize.Format((ulong)disk.Bytes)}{(disk.ReadOnly ? ", read-only" : "")}{(disk.Removable ? ", plugged in" : "")}");
            if (disk.Waiting > 0)
                text.Append(CultureInfo.InvariantCulture, $", {disk.Waiting} request(s) wait for 'cont'");
            text.Append('\n');
        }
        return text.Length == 0 ? "no disks\n" : text.ToString();
    }

    /// <summary><c>device_add DRIVER,file=PATH,...</c>, with the keys of <c>--disk</c>.</summary>
    public static string Add(IDeviceControl? devices, string text)
    {
        int comma = text.IndexOf(',', StringComparison.Ordinal);
        string driver = comma < 0 ? text : text[..comma];
        DiskBus? bus = driver switch
        {
            "virtio-blk" or "virtio-blk-pci" => DiskBus.Virtio,
            "scsi-hd" or "scsi-cd" => DiskBus.Scsi,
            _ => null,
        };
        if (bus is null)
            return $"device_add: '{driver}' is not known; there are virtio-blk, scsi-hd, scsi-cd, virtio-net\n";
        if (comma < 0)
            return $"device_add: {driver} needs file=PATH\n";
        return Carry(devices, control =>
        {
            DiskConfiguration disk = DiskOption.Parse(text[(comma + 1)..], Interlocked.Increment(ref _added), "plugged");
            bool cd = driver == "scsi-cd";
            control.AddDisk(disk with
            {
                Bus = bus.Value,
                Options = cd ? disk.Options with { ReadOnly = true } : disk.Options,
                Settings = disk.Settings with { IsCd = cd },
            });
            return $"{disk.Settings.Name} is plugged in\n";
        });
    }

    public static string Remove(IDeviceControl? devices, string name) => Carry(devices, control =>
    {
        control.Remove(name);
        return $"the guest was asked to let go of {name}\n";
    });

    public static string Resize(IDeviceControl? devices, string name, string size) => Carry(devices, control =>
    {
        if (!MemorySize.TryParse(size, out ulong bytes) || bytes > long.MaxValue)
            return $"'{size}' is no size\n";
        control.ResizeDisk(name, (long)bytes);
        return "";
    });

    public static string Balloon(IDeviceControl? devices) => Carry(devices, control =>
    {
        if (control.Balloon is not { } balloon)
            return "no balloon; start the VM with --device virtio-balloon\n";
        StringBuilder text = new();
        text.Append(CultureInfo.InvariantCulture, $"memory {balloon.Memory >> 20} MiB, in the balloon {balloon.Ballooned >> 20} MiB, given back so far {balloon.GivenBack >> 20} MiB\n");
        if (balloon.Statistics.Total >= 0)
            text.Append(CultureInfo.InvariantCulture, $"guest: total {balloon.Statistics.Total >> 20} MiB, free {balloon.Statistics.Free >> 20} MiB, available {balloon.Statistics.Available >> 20} MiB, caches {balloon.Statistics.Caches >> 20} MiB\n");
        return text.ToString();
    });

    public static string SetMemory(IDeviceControl? devices, string size) => Carry(devices, control =>
    {
        if (!MemorySize.TryParse(size, out ulong bytes))
            return $"'{size}' is no size\n";
        control.SetMemory(bytes);
        return "";
    });

    public static string FreePages(IDeviceControl? devices) => Carry(devices, control =>
    {
        control.ReclaimFreePages();
        return "";
    });

    public static string ResizeConsole(IDeviceControl? devices, string columns, string rows) => Carry(devices, control =>
    {
        if (!ushort.TryParse(columns, NumberStyles.None, CultureInfo.InvariantCulture, out ushort width) || !ushort.TryParse(rows, NumberStyles.None, CultureInfo.InvariantCulture, out ushort height))
            return "console_size COLUMNS ROWS\n";
        control.ResizeConsole(width, height);
        return "";
    });

    private static string Carry(IDeviceControl? devices, Func<IDeviceControl, string> command)
    {
        if (devices is null)
            return "this VM has no devices to ask for\n";
        try
        {
            return command(devices);
        }
        catch (Exception e) when (e is MachineException or CommandException)
        {
            return $"{e.Message}\n";
        }
    }
}
