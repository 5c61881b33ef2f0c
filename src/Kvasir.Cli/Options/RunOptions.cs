using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using Kvasir.Boot;
using Kvasir.Kvm;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary>The options of <c>kvasir run</c> as written; null where not given.</summary>
internal sealed record RunOptions
{
    public string? Image { get; init; }

    public string? Name { get; init; }

    public string? Machine { get; init; }

    public string? Accelerator { get; init; }

    public string? Engine { get; init; }

    public string? Cpus { get; init; }

    public string? Memory { get; init; }

    public string? Cpu { get; init; }

    public string? Kernel { get; init; }

    public string? InitialRamdisk { get; init; }

    public string? Append { get; init; }

    public string? Firmware { get; init; }

    public string? Boot { get; init; }

    public string? Serial { get; init; }

    public string? Display { get; init; }

    public IReadOnlyList<string> Disks { get; init; } = [];

    public IReadOnlyList<string> Shares { get; init; } = [];

    public IReadOnlyList<string> Networks { get; init; } = [];

    public IReadOnlyList<string> SshKeys { get; init; } = [];

    public string? UserData { get; init; }

    public string? HostName { get; init; }

    public string? Size { get; init; }

    public IReadOnlyList<string> Cds { get; init; } = [];

    public IReadOnlyList<string> Devices { get; init; } = [];

    public bool NoReboot { get; init; }

    public string? Log { get; init; }
}

/// <summary>Topics of <c>--log</c>.</summary>
[Flags]
internal enum LogTopics
{
    None = 0,

    /// <summary>Steps in the VM's life.</summary>
    Lifecycle = 1 << 0,

    /// <summary>What KVM could not do.</summary>
    Kvm = 1 << 1,

    /// <summary>What the guest asked of the software CPU that it does not have.</summary>
    Cpu = 1 << 2,

    /// <summary>The translator's counts.</summary>
    Translator = 1 << 3,
}

/// <summary>What <c>kvasir run</c> does after its options were understood.</summary>
/// <param name="DefaultGuest">Nothing to boot was named.</param>
/// <param name="Log">What goes to standard error.</param>
/// <param name="NamesAccelerator">The user named one (or auto) and hears what came of it, also where nothing else is said.</param>
internal sealed record RunPlan(VmConfiguration Configuration, SerialSetting Serial, bool DefaultGuest, LogTopics Log, bool NamesAccelerator)
{
    /// <summary>The NICs; null: nothing was said of them.</summary>
    public IReadOnlyList<NetSetting>? Networks { get; init; }

    /// <summary>SeaBIOS is the firmware; where it lies is not known yet.</summary>
    public bool Bios { get; init; }

    /// <summary>A guest known by name is to run.</summary>
    public bool NamedGuest { get; init; }

    public Guests.SeedOptions Seed { get; init; } = new();

    /// <summary>Bytes asked for the named guest's disk.</summary>
    public long? DiskSize { get; init; }

    /// <summary>The user gave the memory's size.</summary>
    public bool NamesMemory { get; init; }

    /// <summary>How the host reaches the guest's SSH server.</summary>
    public SshDoor? Ssh { get; init; }
}

/// <summary>Checks the options of <c>kvasir run</c> and fills in what was not given. Every fault is one line and <see cref="ExitCode.Usage"/>.</summary>
internal static class RunPlanner
{
    public const int MaximumCpus = 255;

    private const int LongestName = 64;

    /// <exception cref="CommandException">A value is bad, or two contradict each other.</exception>
    public static RunPlan Plan(RunOptions options)
    {
        bool named = options.Image == Guests.DebianGuest.Name;
        CheckImage(options, named);
        (AcceleratorKind accelerator, KernelIrqChip? irqChip) = ParseAccelerator(options.Accelerator ?? "auto");
        CheckEngine(options.Engine);
        if (options.Display is not (null or "none"))
            throw Bad($"--display: '{options.Display}' is not supported yet; only none is");
        bool bios = options.Firmware == "bios" || (options.Firmware is null && options.Kernel is null && !named && (options.Image is not null || options.Boot is not null));
        bool defaultGuest = options.Kernel is null && options.Firmware is null && options.Image is null && !bios;
        if (options.InitialRamdisk is not null && options.Kernel is null)
            throw Bad("--initrd needs --kernel");
        if (options.Append is not null && (options.Firmware is not null || bios))
            throw Bad("--append is for a kernel, and firmware boots none: give --kernel, or change the boot loader's own settings in the disk image");
        if (options.Firmware is "uefi")
            throw Bad("--firmware: 'uefi' is not supported yet; bios is, or give a firmware image's path");
        if (options.Boot is not null && options.Kernel is not null)
            throw Bad("--boot is for firmware, and --kernel starts without one");
        if (options.Firmware is not null && options.Kernel is not null)
            throw Bad("--firmware and --kernel together are not supported yet; give one of them");
        CheckReadable("--kernel", options.Kernel);
        CheckReadable("--firmware", bios ? null : options.Firmware);
        MachineKind machine = ParseMachine(options.Machine ?? "q35");
        if (bios && machine != MachineKind.Q35)
            throw Bad("SeaBIOS boots from PCI devices, which only the machine q35 has; give --kernel, or --machine q35");
        VmConfiguration configuration = new()
        {
            Name = ParseName(options.Name ?? (named ? options.Image : null)),
            Accelerator = accelerator,
            IrqChip = irqChip,
            Engine = options.Engine switch
            {
                "interpreter" => ExecutionEngine.Interpreter,
                "lockstep" => ExecutionEngine.LockStep,
                _ => ExecutionEngine.Translator,
            },
            Machine = machine,
            Cpus = ParseCpus(options.Cpus ?? "1", options.Engine),
            Memory = ParseMemory(options.Memory),
            Cpu = ParseCpu(options.Cpu ?? "max"),
            Kernel = options.Kernel,
            InitialRamdisk = options.InitialRamdisk,
            KernelCommandLine = options.Append ?? "",
            Firmware = bios ? null : options.Firmware,
            Disks = BootOrder.Apply(options.Boot, [.. Disks(options, named).Select((disk, number) => DiskOption.Parse(disk, number)), .. options.Cds.Select(DiskOption.ParseCd)]),
            Shares = ShareOption.Parse(options.Shares),
            Devices = [.. options.Devices.Select(DeviceOption.Parse)],
            NoReboot = options.NoReboot,
        };
        return new RunPlan(configuration, SerialSetting.Parse(options.Serial ?? "stdio"), defaultGuest, ParseLog(options.Log), options.Accelerator is not null && accelerator != AcceleratorKind.Soft)
        {
            // A raw firmware image is no system that would look for a NIC.
            Networks = NetOption.Parse(options.Networks) ?? (options.Firmware is null || bios ? null : []),
            Bios = bios,
            NamedGuest = named,
            Seed = new Guests.SeedOptions { SshKeys = options.SshKeys, UserData = options.UserData, HostName = ParseHostName(options.HostName) },
            DiskSize = ParseDiskSize(options.Size, named),
            NamesMemory = options.Memory is not null,
        };
    }

    private static void CheckImage(RunOptions options, bool named)
    {
        bool seed = options.SshKeys.Count > 0 || options.UserData is not null || options.HostName is not null;
        if (options.Image is not { } image)
        {
            if (seed && options.Disks.Count == 0)
                throw Bad("--ssh-key, --user-data and --hostname are for a guest with a disk: name an image, as 'debian'");
            return;
        }
        if (named && (options.Kernel is not null || options.InitialRamdisk is not null || options.Firmware is not null))
            throw Bad($"{image} has its own kernel; leave --kernel, --initrd and --firmware out (./{image} is a file of that name)");
        if (named)
            return;
        CheckReadable("IMAGE", image);
    }

    /// <summary>The image that was named comes first.</summary>
    private static IEnumerable<string> Disks(RunOptions options, bool named) =>
        options.Image is { } image && !named ? options.Disks.Prepend(Guests.NamedGuest.Escape(image)) : options.Disks;

    private static string? ParseHostName(string? text) =>
        text is null || Guests.SeedDisk.IsHostName(text) ? text : throw Bad($"--hostname: '{text}' is no host name: up to 63 letters, digits and '-'");

    private static long? ParseDiskSize(string? text, bool named)
    {
        if (text is null)
            return null;
        if (!named)
            throw Bad("--size is for a guest known by name, as 'debian'; 'kvasir img resize' grows an image");
        return MemorySize.TryParse(text, out ulong bytes) && bytes is > 0 and <= 1ul << 44 && bytes % 512 == 0
            ? (long)bytes
            : throw Bad($"--size: '{text}' is no disk size; write it as 20G");
    }

    private static (AcceleratorKind Kind, KernelIrqChip? IrqChip) ParseAccelerator(string text)
    {
        string[] parts = text.Split(',');
        AcceleratorKind kind = parts[0] switch
        {
            "auto" => AcceleratorKind.Auto,
            "kvm" => AcceleratorKind.Kvm,
            "soft" => AcceleratorKind.Soft,
            _ => throw Bad($"--accel: '{parts[0]}' is none of auto, kvm, soft"),
        };
        KernelIrqChip? irqChip = null;
        foreach (string setting in parts.Skip(1))
        {
            const string name = "kernel-irqchip=";
            if (!setting.StartsWith(name, StringComparison.Ordinal) || kind == AcceleratorKind.Soft)
                throw Bad($"--accel: '{setting}' is no setting of {parts[0]}");
            irqChip = setting[name.Length..] switch
            {
                "on" => KernelIrqChip.On,
                "split" => KernelIrqChip.Split,
                "off" => KernelIrqChip.Off,
                string other => throw Bad($"--accel: kernel-irqchip={other} is none of on, split, off"),
            };
        }
        return (kind, irqChip);
    }

    private static void CheckEngine(string? engine)
    {
        if (engine is not (null or "translator" or "interpreter" or "lockstep"))
            throw Bad($"--engine: '{engine}' is none of translator, interpreter, lockstep");
    }

    public static string ParseName(string? text)
    {
        if (text is null)
            return $"vm-{Environment.ProcessId}";
        bool valid = text.Length is > 0 and <= LongestName && char.IsAsciiLetterOrDigit(text[0])
            && text.All(c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.');
        return valid ? text : throw Bad($"--name: '{text}' is no name: up to {LongestName} letters, digits, '-', '_' and '.', a letter or digit first");
    }

    private static MachineKind ParseMachine(string text) => text switch
    {
        "q35" => MachineKind.Q35,
        "microvm" => MachineKind.Microvm,
        "pc" => throw Bad("--machine: pc is not supported yet; use q35 or microvm"),
        _ => throw Bad($"--machine: '{text}' is none of q35, microvm"),
    };

    private static int ParseCpus(string text, string? engine)
    {
        if (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int cpus) || cpus is < 1 or > MaximumCpus)
            throw Bad($"--cpus: '{text}' is no number from 1 to {MaximumCpus}");
        if (engine == "lockstep" && cpus != 1)
            throw Bad("--engine: lockstep compares one vCPU, and is not to be had with --cpus");
        return cpus;
    }

    private static ulong ParseMemory(string? text)
    {
        if (text is null)
            return VmConfiguration.DefaultMemory;
        if (!MemorySize.TryParse(text, out ulong bytes))
            throw Bad($"--memory: '{text}' is no size; write it as 512M or 4G");
        if (bytes < VmConfiguration.MinimumMemory || bytes % 4096 != 0)
            throw Bad($"--memory: {text} is not at least {MemorySize.Format(VmConfiguration.MinimumMemory)} and a multiple of 4K");
        return bytes > 1ul << 40 ? throw Bad($"--memory: {text} is more than a machine takes (1T)") : bytes;
    }

    /// <summary>Checks the form; whether there is such a model or feature, the accelerator knows.</summary>
    private static string ParseCpu(string text)
    {
        string[] parts = text.Split(',');
        foreach (string feature in parts.Skip(1))
        {
            if (feature.Length < 2 || feature[0] is not ('+' or '-'))
                throw Bad($"--cpu: '{feature}' is no feature; write +NAME or -NAME");
        }
        return parts[0].Length == 0 ? throw Bad("--cpu: the model is missing; write host or max first") : text;
    }

    private static LogTopics ParseLog(string? text)
    {
        LogTopics topics = LogTopics.None;
        foreach (string what in (text ?? "").Split(',', StringSplitOptions.RemoveEmptyEntries))
        {
            topics |= what switch
            {
                "vm" => LogTopics.Lifecycle,
                "kvm" => LogTopics.Kvm,
                "cpu" => LogTopics.Cpu,
                "translator" => LogTopics.Translator,
                _ => throw Bad($"--log: '{what}' is none of vm, kvm, cpu, translator"),
            };
        }
        return text is "" ? throw Bad("--log: name what to log: vm, kvm, cpu, translator") : topics;
    }

    private static void CheckReadable(string option, string? path)
    {
        if (path is null)
            return;
        try
        {
            using FileStream file = File.OpenRead(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw Bad($"{option}: cannot read '{path}': {FileFault.Reason(e)}");
        }
    }

    private static CommandException Bad(string message) => new(ExitCode.Usage, message);
}
