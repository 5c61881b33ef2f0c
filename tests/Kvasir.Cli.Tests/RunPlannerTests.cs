using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Kvasir.Boot;
using Kvasir.Block;
using Kvasir.Devices.Storage;
using Kvasir.Cli.Options;
using Kvasir.Kvm;
using Kvasir.Machine;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class RunPlannerTests
{
    private static readonly string SomeFile = typeof(RunPlannerTests).Assembly.Location;

    [Fact]
    public void NothingNamedIsTheDefaultGuestOnTheDefaultMachine()
    {
        RunPlan plan = RunPlanner.Plan(new RunOptions());
        Assert.True(plan.DefaultGuest);
        Assert.Equal(MachineKind.Q35, plan.Configuration.Machine);
        Assert.Equal((AcceleratorKind.Auto, ExecutionEngine.Translator), (plan.Configuration.Accelerator, plan.Configuration.Engine));
        Assert.Equal(1, plan.Configuration.Cpus);
        Assert.Equal(512ul << 20, plan.Configuration.Memory);
        Assert.Equal("max", plan.Configuration.Cpu);
        Assert.Equal(SerialKind.Stdio, plan.Serial.Kind);
        Assert.Equal($"vm-{Environment.ProcessId}", plan.Configuration.Name);
        Assert.False(plan.Configuration.NoReboot);
    }

    [Fact]
    public void EveryOptionReachesTheConfiguration()
    {
        RunPlan plan = RunPlanner.Plan(new RunOptions
        {
            Name = "web-1",
            Machine = "microvm",
            Accelerator = "soft",
            Engine = "interpreter",
            Cpus = "4",
            Memory = "2G",
            Cpu = "host,+avx2,-smap",
            Kernel = SomeFile,
            InitialRamdisk = "anything",
            Append = "console=ttyS0 quiet",
            Serial = "file:/tmp/log",
            Display = "none",
            Devices = ["isa-debug-exit,iobase=0xf4,iosize=0x04", "debugcon,iobase=0x402"],
            NoReboot = true,
            Log = "vm",
        });
        VmConfiguration c = plan.Configuration;
        Assert.Equal("web-1", c.Name);
        Assert.Equal(MachineKind.Microvm, c.Machine);
        Assert.Equal((AcceleratorKind.Soft, ExecutionEngine.Interpreter), (c.Accelerator, c.Engine));
        Assert.Equal(4, c.Cpus);
        Assert.Equal(2ul << 30, c.Memory);
        Assert.Equal("host,+avx2,-smap", c.Cpu);
        Assert.Equal(SomeFile, c.Kernel);
        Assert.Equal("anything", c.InitialRamdisk);
        Assert.Equal("console=ttyS0 quiet", c.KernelCommandLine);
        Assert.True(c.NoReboot);
        Assert.Equal(2, c.Devices.Count);
        Assert.Equal("isa-debug-exit", c.Devices[0].Name);
        Assert.Equal("0xf4", c.Devices[0].Settings["iobase"]);
        Assert.Equal("0x402", c.Devices[1].Settings["iobase"]);
        Assert.Equal(new SerialSetting(SerialKind.File, "/tmp/log"), plan.Serial);
        Assert.False(plan.DefaultGuest);
        Assert.Equal(LogTopics.Lifecycle, plan.Log);
    }

    [Theory]
    [InlineData("kvm", AcceleratorKind.Kvm, null)]
    [InlineData("kvm,kernel-irqchip=on", AcceleratorKind.Kvm, KernelIrqChip.On)]
    [InlineData("auto,kernel-irqchip=split", AcceleratorKind.Auto, KernelIrqChip.Split)]
    [InlineData("kvm,kernel-irqchip=off", AcceleratorKind.Kvm, KernelIrqChip.Off)]
    public void An_accelerator_takes_settings(string text, AcceleratorKind kind, KernelIrqChip? irqChip)
    {
        VmConfiguration c = RunPlanner.Plan(new RunOptions { Accelerator = text }).Configuration;
        Assert.Equal((kind, irqChip), (c.Accelerator, c.IrqChip));
    }

    [Theory]
    [InlineData("--machine: pc is not supported yet", "machine", "pc")]
    [InlineData("--machine: 'q36' is none of", "machine", "q36")]
    [InlineData("--accel: 'tcg' is none of", "accel", "tcg")]
    [InlineData("--accel: 'x=1' is no setting of kvm", "accel", "kvm,x=1")]
    [InlineData("--accel: 'kernel-irqchip=on' is no setting of soft", "accel", "soft,kernel-irqchip=on")]
    [InlineData("--accel: kernel-irqchip=maybe is none of on, split, off", "accel", "kvm,kernel-irqchip=maybe")]
    [InlineData("--cpus: '0'", "cpus", "0")]
    [InlineData("--cpus: '256'", "cpus", "256")]
    [InlineData("--cpus: 'two'", "cpus", "two")]
    [InlineData("--memory: '1X' is no size", "memory", "1X")]
    [InlineData("--memory: 512K is not at least 1M", "memory", "512K")]
    [InlineData("--memory: 1048577B", "memory", "1048577B")]
    [InlineData("--memory: 2T is more", "memory", "2T")]
    [InlineData("--cpu: 'avx' is no feature", "cpu", "host,avx")]
    [InlineData("--cpu: the model is missing", "cpu", ",+avx")]
    [InlineData("--name: ''", "name", "")]
    [InlineData("--name: '../x' is no name", "name", "../x")]
    [InlineData("--name: '.hidden' is no name", "name", ".hidden")]
    [InlineData("--serial: 'pty' is none of", "serial", "pty")]
    [InlineData("--serial: 'file:' is none of", "serial", "file:")]
    [InlineData("--display: 'vnc=:1' is not supported yet", "display", "vnc=:1")]
    [InlineData("--log: 'all' is none of vm, kvm, cpu, translator", "log", "all")]
    [InlineData("--kernel: cannot read '/nonexistent/kernel': there is no such file", "kernel", "/nonexistent/kernel")]
    [InlineData("--kernel: cannot read '/etc'", "kernel", "/etc")]
    [InlineData("--firmware: 'uefi' is not supported yet", "firmware", "uefi")]
    [InlineData("--boot: 'usb' is none of disk, cdrom", "boot", "usb")]
    [InlineData("--boot: net is not supported yet", "boot", "net")]
    [InlineData("--boot: the VM has no cdrom", "boot", "cdrom")]
    [InlineData("--disk: bootindex: 'first' is no number", "disk", "d.img,bootindex=first")]
    [InlineData("--initrd needs --kernel", "initrd", "x")]
    [InlineData("IMAGE: cannot read 'disk.qcow2'", "image", "disk.qcow2")]
    [InlineData("--device: 'nvme' is not known", "device", "nvme")]
    [InlineData("--device: isa-debug-exit has no setting 'port'", "device", "isa-debug-exit,port=1")]
    [InlineData("--device: isa-debug-exit: '0x10000' is no value for iobase", "device", "isa-debug-exit,iobase=0x10000")]
    [InlineData("--device: isa-debug-exit: '3' is no value for iosize", "device", "isa-debug-exit,iosize=3")]
    [InlineData("--device: debugcon: iobase is given twice", "device", "debugcon,iobase=1,iobase=2")]
    [InlineData("--device: pc-testdev takes no settings", "device", "pc-testdev,x=1")]
    [InlineData("--device: virtio-console needs its other side", "device", "virtio-console")]
    [InlineData("--device: virtio-port needs name=NAME", "device", "virtio-port,file=x")]
    [InlineData("--disk: the path is missing", "disk", ",readonly")]
    [InlineData("--disk: 'colour' is not known", "disk", "d.img,colour=red")]
    [InlineData("--disk: Invalid cache option: some", "disk", "d.img,cache=some")]
    [InlineData("--disk: bus: 'isa' is neither virtio nor scsi", "disk", "d.img,bus=isa")]
    [InlineData("--disk: werror: 'panic' is none of", "disk", "d.img,werror=panic")]
    [InlineData("--disk: serial: ", "disk", "d.img,serial=123456789012345678901")]
    [InlineData("--disk: queues: '0' is no number", "disk", "d.img,queues=0")]
    [InlineData("--disk: logical-block: '1000' is no power of two", "disk", "d.img,logical-block=1000")]
    public void ABadValueIsOneLineAndExitCode2(string expected, string option, string value)
    {
        RunOptions options = option switch
        {
            "machine" => new RunOptions { Machine = value },
            "accel" => new RunOptions { Accelerator = value },
            "engine" => new RunOptions { Engine = value },
            "cpus" => new RunOptions { Cpus = value },
            "memory" => new RunOptions { Memory = value },
            "cpu" => new RunOptions { Cpu = value },
            "name" => new RunOptions { Name = value },
            "serial" => new RunOptions { Serial = value },
            "display" => new RunOptions { Display = value },
            "log" => new RunOptions { Log = value },
            "kernel" => new RunOptions { Kernel = value },
            "firmware" => new RunOptions { Firmware = value },
            "boot" => new RunOptions { Boot = value },
            "initrd" => new RunOptions { InitialRamdisk = value },
            "image" => new RunOptions { Image = value },
            "device" => new RunOptions { Devices = [value] },
            "disk" => new RunOptions { Disks = [value] },
            _ => throw new ArgumentOutOfRangeException(nameof(option)),
        };
        CommandException fault = Assert.Throws<CommandException>(() => RunPlanner.Plan(options));
        Assert.StartsWith(expected, fault.Message, StringComparison.Ordinal);
        Assert.Equal(ExitCode.Usage, fault.ExitCode);
        Assert.DoesNotContain('\n', fault.Message);
    }

    [Fact]
    public void ADiskIsUnderstood()
    {
        IReadOnlyList<DiskConfiguration> disks = RunPlanner.Plan(new RunOptions
        {
            Disks = ["a,,b.qcow2,format=qcow2,bus=scsi,readonly,snapshot,cache=none,serial=S1,id=root,queues=3,werror=stop,rerror=ignore,iops=50,physical-block=512", "d.img"],
            Cds = ["cd.iso"],
        }).Configuration.Disks;
        Assert.Equal(("a,b.qcow2", DiskBus.Scsi, 3), (disks[0].Path, disks[0].Bus, disks[0].Queues));
        Assert.Equal(("qcow2", true, true, CacheMode.None), (disks[0].Options.Format, disks[0].Options.ReadOnly, disks[0].Options.Snapshot, disks[0].Options.Cache));
        Assert.Equal(50, disks[0].Options.Throttle!.RequestsPerSecond.Average);
        Assert.Equal(
            new DiskSettings { Name = "root", Serial = "S1", PhysicalBlock = 512, WriteError = ErrorPolicy.Stop, ReadError = ErrorPolicy.Ignore }, disks[0].Settings);
        Assert.Equal(("disk1", true, DiskBus.Virtio), (disks[1].Settings.Name, disks[1].Options.Probe, disks[1].Bus));
        Assert.Equal(("cd.iso", true, true, DiskBus.Scsi), (disks[2].Path, disks[2].Settings.IsCd, disks[2].Options.ReadOnly, disks[2].Bus));
    }

    [Fact]
    public void AnImageWithoutAKernelIsBootedByTheBios()
    {
        RunPlan plan = RunPlanner.Plan(new RunOptions { Image = SomeFile, Disks = ["d.img"] });
        Assert.True(plan is { Bios: true, DefaultGuest: false, Networks: null });
        Assert.Equal(SomeFile, plan.Configuration.Disks[0].Path);
        Assert.True(RunPlanner.Plan(new RunOptions { Firmware = "bios" }).Bios);
        Assert.False(RunPlanner.Plan(new RunOptions { Image = SomeFile, Kernel = SomeFile }).Bios);
        Assert.False(RunPlanner.Plan(new RunOptions { Image = "debian" }).Bios);
        Assert.Contains("--append is for a kernel", Assert.Throws<CommandException>(() => RunPlanner.Plan(new RunOptions { Image = SomeFile, Append = "x" })).Message, StringComparison.Ordinal);
        Assert.Contains("only the machine q35", Assert.Throws<CommandException>(() => RunPlanner.Plan(new RunOptions { Image = SomeFile, Machine = "microvm" })).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(null, "0 1 2 3", "a", "b")]
    [InlineData("disk", "0 1 2 3", "a", "b")]
    [InlineData("cdrom", "2 3 0 1", "a", "b")]
    [InlineData("cdrom,disk", "2 3 0 1", "a", "b")]
    [InlineData("cdrom", "1 2 3 0", "a", "b,bootindex=7")]
    [InlineData(null, "1 0 2 3", "a,bootindex=5", "b,bootindex=4")]
    public void DisksAreTriedInTheOrderAskedFor(string? boot, string expected, string first, string second)
    {
        IReadOnlyList<DiskConfiguration> disks = RunPlanner.Plan(new RunOptions { Firmware = "bios", Boot = boot, Disks = [first, second], Cds = ["c", "d"] }).Configuration.Disks;
        Assert.Equal(expected, string.Join(' ', disks.Index().OrderBy(disk => disk.Item.BootIndex).Select(disk => disk.Index)));
    }

    [Fact]
    public void TwoDisksCannotBothBeFirst() => Assert.Contains(
        "is given to two disks", Assert.Throws<CommandException>(() => RunPlanner.Plan(new RunOptions { Disks = ["a,bootindex=1", "b,bootindex=1"] })).Message, StringComparison.Ordinal);

    [Theory]
    [InlineData("", "which command?")]
    [InlineData("start", "unknown command 'start'")]
    [InlineData("run --frobnicate", "unknown option '--frobnicate'")]
    [InlineData("run --frobnicate=3 x", "unknown option '--frobnicate'")]
    [InlineData("run --floppy f.img", "--floppy is not supported yet")]
    [InlineData("run --cpus", "--cpus needs a value")]
    [InlineData("run --cpus 1 --cpus 2", "--cpus is given more than once")]
    [InlineData("run a b", "one argument too many: 'b'")]
    [InlineData("doctor now", "one argument too many: 'now'")]
    public void WordsThatMeanNothingAreNamed(string line, string expected)
    {
        string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        CommandException fault = Assert.Throws<CommandException>(
            () => CommandLine.Invoke(CommandLine.Build(_ => 0, () => 0, _ => 0), words));
        Assert.StartsWith(expected, fault.Message, StringComparison.Ordinal);
        Assert.Equal(ExitCode.Usage, fault.ExitCode);
    }

    [Fact]
    public void ValuesThatLookLikeOptionsReachTheirOption()
    {
        RunOptions? seen = null;
        int code = CommandLine.Invoke(
            CommandLine.Build(
                options =>
                {
                    seen = options;
                    return 5;
                },
                () => 0,
                _ => 0),
            ["run", "--append=--single @file", "--device", "debugcon", "--device", "pc-testdev", "--no-reboot"]);
        Assert.Equal(5, code);
        Assert.Equal("--single @file", seen!.Append);
        Assert.Equal(["debugcon", "pc-testdev"], seen.Devices);
        Assert.True(seen.NoReboot);
        Assert.Null(seen.Memory);
    }

    [Fact]
    public void TheFileOfAnUnreadableKernelIsNotLeftOpen()
    {
        string path = Path.Combine(Path.GetTempPath(), $"kvasir-test-{Guid.NewGuid():N}");
        File.WriteAllText(path, "x");
        RunPlanner.Plan(new RunOptions { Kernel = path });
        using (File.Open(path, FileMode.Open, FileAccess.ReadWrite, FileShare.None))
            File.Delete(path);
    }
}
