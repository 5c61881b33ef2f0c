using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Kvasir.Cli.Guests;
using Kvasir.Cli.Options;
using Kvasir.Cli.Terminal;
using Kvasir.Linux;
using Kvasir.Machine;
using Kvasir.Machine.Boards;

namespace Kvasir.Cli;

/// <summary><c>kvasir run</c>: builds the VM, connects it to the terminal, and stays until it ends.</summary>
internal static class RunCommand
{
    /// <summary>How long a guest has to shut down after SIGTERM.</summary>
    private static readonly TimeSpan Grace = TimeSpan.FromSeconds(30);

    public static int Execute(RunOptions options)
    {
        RunPlan plan = RunPlanner.Plan(options);
        if (plan.DefaultGuest)
            plan = WithDefaultGuest(plan);
        if (plan.Bios)
            plan = plan with { Configuration = plan.Configuration with { Firmware = GuestProgress.Show("firmware", SeaBios.Get) } };
        VmConfiguration configuration = plan.Configuration;
        using RunFolder folder = RunFolder.Take(configuration.Name);
        if (plan.NamedGuest)
            plan = NamedGuest.Prepare(plan, plan.Seed, plan.DiskSize);
        else if (plan.Seed.Any)
            plan = NamedGuest.WithSeed(plan, plan.Seed);
        configuration = plan.Configuration;
        plan.Ssh?.Write(folder.Path);
        plan = plan with { Configuration = configuration with { Devices = [.. configuration.Devices.Select(device => WithSocket(device, folder.Path))] } };
        ProcessIdentity.SetName($"kvasir:{configuration.Name}");
        bool interactive = plan.Serial.Kind == SerialKind.Stdio && TerminalMode.IsTerminal(FileDescriptor.StandardInput);
        using SerialConnection serial = new(plan.Serial, interactive);
        using DebugOutputs debug = new();
        using NetworkConnections networks = NetworkConnections.Open(plan.Networks, configuration.Name, line => Say(line, interactive), interactive);
        VmOutcome outcome;
        try
        {
            using VirtualMachine vm = Build(plan, serial, debug, networks, interactive);
            outcome = Run(vm, serial, networks, debug, interactive);
        }
        catch (Exception e) when (e is MachineException or LinuxException)
        {
            throw new CommandException(e is LinuxException ? ExitCode.HostTrouble : ExitCode.Usage, e.Message, e);
        }
        return Conclude(outcome);
    }

    /// <summary>The socket of a virtio-vsock device lies in the VM's own folder where none was named.</summary>
    private static DeviceSetting WithSocket(DeviceSetting device, string folder) => device.Name != "virtio-vsock" || device.Settings.ContainsKey("socket")
        ? device
        : device with { Settings = new Dictionary<string, string>(device.Settings, StringComparer.Ordinal) { ["socket"] = Path.Combine(folder, "vsock") } };

    private static RunPlan WithDefaultGuest(RunPlan plan)
    {
        GuestFiles files = GuestProgress.Show("default guest", report => DefaultGuest.Get(Userland.Amd64, report));
        string append = plan.Configuration.KernelCommandLine;
        return plan with
        {
            Configuration = plan.Configuration with
            {
                Kernel = files.Kernel,
                InitialRamdisk = files.InitialRamdisk,
                KernelCommandLine = append.Length == 0 ? DefaultGuest.KernelCommandLine : $"{DefaultGuest.KernelCommandLine} {append}",
            },
        };
    }

    private static VirtualMachine Build(RunPlan plan, SerialConnection serial, DebugOutputs debug, NetworkConnections networks, bool interactive)
    {
        Acceleration acceleration = Accelerators.Select(
            plan.Configuration,
            new AcceleratorLogs(Log(LogTopics.Kvm, "kvm"), Log(LogTopics.Cpu, "cpu"), Log(LogTopics.Translator, "translator")),
            new ProbeMemory(Path.Combine(UserFolders.Cache, "kvm-speed")));
        // A script that asked for nothing hears nothing: standard error is its guest's to report on.
        if (plan.Configuration.Accelerator != AcceleratorKind.Soft && (interactive || plan.NamesAccelerator || plan.Log.HasFlag(LogTopics.Kvm)))
            Say($"accel: {acceleration.Reason}", interactive);
        BoardConnections connections = new()
        {
            Serial = serial.Backend,
            DebugConsole = debug.Open,
            Nics = networks.Nics,
            Processors = acceleration.Processors,
            TscFrequency = acceleration.TscFrequency,
        };
        return new VirtualMachine(power => Boards.Build(plan.Configuration, connections, power), plan.Configuration.NoReboot, Log(LogTopics.Lifecycle, "vm"));

        Action<string>? Log(LogTopics topic, string name) => plan.Log.HasFlag(topic) ? line => Say($"{name}: {line}", interactive) : null;
    }

    private static VmOutcome Run(VirtualMachine vm, SerialConnection serial, NetworkConnections networks, DebugOutputs debug, bool interactive)
    {
        serial.Monitor(vm, new NetworkMonitor(vm, networks));
        vm.Halted += reason => Say($"the VM is paused: {reason}; 'cont' in the monitor goes on", interactive);
        // Signals first and last: one that nobody handles would leave a raw terminal behind.
        using SignalHandling signals = new(vm, Grace, line => Say(line, interactive));
        using TerminalSession? terminal = interactive ? new TerminalSession() : null;
        vm.Start();
        serial.Start();
        debug.Start();
        VmOutcome outcome = vm.Outcome.GetAwaiter().GetResult();
        // The guest's last words come before the terminal is a line editor again.
        serial.Dispose();
        return outcome;
    }

    private static int Conclude(VmOutcome outcome)
    {
        switch (outcome.End)
        {
            case VmEnd.GuestExit:
                // A process's exit status has eight bits; a guest's wider code keeps its low ones, as the kernel does it.
                return outcome.GuestCode & 0xff;
            case VmEnd.TripleFault:
                Console.Error.WriteLine($"kvasir: the guest crashed (triple fault)\n{outcome.Report}");
                return (int)ExitCode.GuestCrash;
            case VmEnd.Failure:
                Console.Error.WriteLine($"kvasir: the VM cannot go on\n{outcome.Report}");
                return (int)ExitCode.HostTrouble;
            default:
                return (int)ExitCode.Success;
        }
    }

    /// <summary>A line of ours on standard error, which on a raw terminal must return the carriage itself.</summary>
    private static void Say(string line, bool raw) => Console.Error.Write(raw ? $"{line}\r\n" : $"{line}\n");
}
