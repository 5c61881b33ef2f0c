using System;
using System.Text;
using Kvasir.Machine;

namespace Kvasir.Cli.Terminal;

/// <summary>The monitor behind Ctrl-A C: a line editor and the commands that QEMU's users know, by the same names.</summary>
internal sealed class ConsoleMonitor(IMachineControl machine, Action<string> print, NetworkMonitor? network = null)
{
    private const string Prompt = "(kvasir) ";

    private const string Keys = """

        Ctrl-A X  end the VM
        Ctrl-A C  open or close the monitor
        Ctrl-A B  send a break
        Ctrl-A A  send Ctrl-A
        Ctrl-A H  this help

        """;

    private const string Commands = """
        info status       whether the VM runs
        stop              pause the VM
        cont              let it go on
        info block        the disks
        info balloon      the guest's memory, as it says
        balloon SIZE      have the guest come down (or up) to so much memory
        balloon_free_pages   have the guest give all its free memory back, once
        console_size COLUMNS ROWS   tell the guest's virtio console of a terminal's size
        device_add virtio-blk|scsi-hd|scsi-cd,file=PATH[,id=NAME,KEY=VALUE]   plug a disk in
        device_add virtio-net[,user|tap|socket,id=NAME,KEY=VALUE]   plug a NIC in, with the keys of --net
        device_del NAME   have the guest let go of a device that was plugged in
        block_resize NAME SIZE   change a disk's size
        system_reset      pull the reset line
        system_powerdown  press the power button
        quit              end the VM
        info network      the VM's NICs
        info usernet      connections and forwards of user networks
        hostfwd_add [NIC] tcp|udp:[HOST]:PORT-[GUEST]:PORT    open a port of the host
        hostfwd_remove [NIC] tcp|udp:[HOST]:PORT              close it
        set_link NIC on|off                                   put the cable in or pull it out
        help              this list
        Ctrl-A C goes back to the guest.

        """;

    private const int LongestLine = 256;

    private readonly StringBuilder _line = new();

    public bool IsOpen { get; private set; }

    public void Toggle()
    {
        IsOpen = !IsOpen;
        _line.Clear();
        print(IsOpen ? $"\nKvasir monitor; 'help' lists its commands.\n{Prompt}" : "\n");
    }

    public void Quit() => machine.Stop();

    public void ShowKeys() => print(Keys);

    /// <summary>Takes a key typed while the monitor is open.</summary>
    public void Key(byte key)
    {
        switch (key)
        {
            case (byte)'\r' or (byte)'\n':
                string line = _line.ToString();
                _line.Clear();
                print("\n");
                print(Execute(line));
                if (machine.State != VmState.Finished)
                    print(Prompt);
                break;
            case 0x7f or 0x08:
                if (_line.Length > 0)
                {
                    _line.Length--;
                    print("\b \b");
                }
                break;
            case 0x03 or 0x15:
                _line.Clear();
                print($"\n{Prompt}");
                break;
            case 0x04:
                Toggle();
                break;
            case >= 0x20 and < 0x7f when _line.Length < LongestLine:
                _line.Append((char)key);
                print(((char)key).ToString());
                break;
            default:
                break;
        }
    }

    /// <summary>Carries out one line.</summary>
    /// <returns>The answer, with its line ends; empty where there is nothing to say.</returns>
    public string Execute(string line)
    {
        string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        switch (words)
        {
            case []:
                return "";
            case ["info", "status"]:
                return $"VM status: {Describe(machine.State)}, {machine.VcpuCount} vCPU(s)\n";
            case ["stop" or "s"]:
                machine.Pause();
                return "";
            case ["cont" or "c"]:
                machine.Resume();
                return "";
            case ["system_reset"]:
                machine.Reset();
                return "";
            case ["system_powerdown"]:
                return machine.PressPowerButton() ? "" : "the guest does not listen for the power button\n";
            case ["quit" or "q"]:
                machine.Stop();
                return "";
            case ["help" or "?"]:
                return Commands;
            case ["info", "block"]:
                return DeviceCommands.Disks(machine.Devices);
            case ["info", "balloon"]:
                return DeviceCommands.Balloon(machine.Devices);
            case ["info", ..]:
                return network?.Execute(words) ?? "info: 'info status', 'info block', 'info balloon', 'info network', 'info usernet'\n";
            case ["balloon", string memory]:
                return DeviceCommands.SetMemory(machine.Devices, memory);
            case ["balloon_free_pages"]:
                return DeviceCommands.FreePages(machine.Devices);
            case ["console_size", string columns, string rows]:
                return DeviceCommands.ResizeConsole(machine.Devices, columns, rows);
            case ["device_add", string text] when network is not null && text.Split(',')[0] is "virtio-net" or "virtio-net-pci":
                return network.Plug(text);
            case ["device_add", string text]:
                return DeviceCommands.Add(machine.Devices, text);
            case ["device_del", string name]:
                return DeviceCommands.Remove(machine.Devices, name);
            case ["block_resize", string name, string size]:
                return DeviceCommands.Resize(machine.Devices, name, size);
            case ["device_add" or "device_del" or "block_resize", ..]:
                return "device_add virtio-blk|scsi-hd|scsi-cd,file=PATH[,id=NAME,KEY=VALUE]; device_add virtio-net[,KIND,id=NAME,KEY=VALUE]; device_del NAME; block_resize NAME SIZE\n";
            default:
                if (network?.Execute(words) is { } answer)
                    return answer;
                return $"unknown command '{words[0]}'; 'help' lists what there is\n";
        }
    }

    private static string Describe(VmState state) => state switch
    {
        VmState.Created => "not started",
        VmState.Running => "running",
        VmState.Paused => "paused",
        _ => "ended",
    };
}
