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
        string bus = driver switch
        {
            "virtio-blk" or "virtio-blk-pci" => "virtio",
            _ => "",
        };
        if (bus.Length == 0)
            return $"device_add: '{driver}' is not known; there is virtio-blk\n";
        if (comma < 0)
            return $"device_add: {driver} needs file=PATH\n";
        return Carry(devices, control =>
        {
            DiskConfiguration disk = DiskOption.Parse(text[(comma + 1)..], Interlocked.Increment(ref _added), "plugged");
            control.AddDisk(disk with { Bus = bus == "virtio" ? DiskBus.Virtio : DiskBus.Scsi });
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
