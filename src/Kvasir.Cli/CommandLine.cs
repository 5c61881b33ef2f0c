using System;
using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Invocation;
using System.CommandLine.Parsing;
using System.Linq;
using Kvasir.Cli.Options;

namespace Kvasir.Cli;

/// <summary>The command tree. It understands words only; what they mean is checked by the commands.</summary>
internal static class CommandLine
{
    /// <summary>Options that the design promises and that no part carries yet: a clearer answer than "unknown option".</summary>
    private static readonly string[] Promised = ["--floppy", "--control", "--gdb"];

    private const string RunExamples = """
        Examples:
          kvasir run                                        a small Linux with a shell on this terminal
          kvasir run --cpus 2 --memory 1G                   the same, larger
          kvasir run debian                                 Debian 12 with a disk of its own; kvasir ssh debian logs in
          kvasir run debian --name web --size 20G --net user,hostfwd=tcp:127.0.0.1:8080-:80
          kvasir run disk.qcow2 --memory 2G                  a disk image with its own boot loader, through SeaBIOS
          kvasir run --cdrom install.iso --disk new.qcow2 --boot cdrom
          kvasir run --kernel bzImage --initrd initrd.img --append 'console=ttyS0'
          kvasir run --machine microvm --firmware rom.bin --device isa-debug-exit,iobase=0xf4,iosize=0x04

        On the terminal, Ctrl-A X ends the VM, Ctrl-A C opens the monitor, Ctrl-A H helps.
        Exit codes: 0 guest powered off, 1 host trouble, 2 bad usage, 3 guest crashed; isa-debug-exit gives (value << 1) | 1.
        """;

    /// <summary>Builds the tree.</summary>
    /// <param name="run">Carries out <c>kvasir run</c>.</param>
    /// <param name="doctor">Carries out <c>kvasir doctor</c>.</param>
    /// <param name="guest">Carries out <c>kvasir guest</c> with the userland asked for.</param>
    public static RootCommand Build(Func<RunOptions, int> run, Func<int> doctor, Func<string, int> guest)
    {
        RootCommand root = new("Kvasir runs virtual machines.") 
        {
            Run(run), Ssh(), Images(), Doctor(doctor), Guest(guest),
            // Carried out before the tree is asked (StorageCommands); here they are known to the help.
            new Command("img", "Create, convert, check and change disk images, with qemu-img's command line."),
            new Command("io", "Read, write and inspect a disk image, with qemu-io's commands."),
            new Command("nbd", "Serve a disk image over NBD, with qemu-nbd's options."),
        };
        foreach (Option option in root.Options)
        {
            if (option is VersionOption version)
                version.Action = new Saying(() => Program.Version);
        }
        return root;
    }

    /// <summary>Parses and carries out a command line.</summary>
    public static int Invoke(RootCommand root, string[] arguments)
    {
        ParseResult result = root.Parse(arguments, new ParserConfiguration { EnablePosixBundling = false, ResponseFileTokenReplacer = null });
        if ((result.Errors.Count > 0 || MisreadOption(result) is not null) && result.Action is not HelpAction and not HelpWithExamples and not Saying)
            throw new CommandException(ExitCode.Usage, Describe(result));
        return result.Invoke(new InvocationConfiguration { EnableDefaultExceptionHandler = false, ProcessTerminationTimeout = null });
    }

    private static Command Run(Func<RunOptions, int> run)
    {
        Argument<string?> image = new("IMAGE") { Arity = ArgumentArity.ZeroOrOne, Description = "a guest known by name (debian), or a disk image, booted by firmware or with --kernel" };
        Option<string> name = Text("--name", "N", "the VM's name; one running VM has it at a time");
        Option<string> machine = Text("--machine", "q35|microvm", "the board (default: q35)");
        Option<string> accelerator = Text("--accel", "auto|kvm|soft[,kernel-irqchip=on|split|off]", "what executes the guest (default: auto); which interrupt controllers are KVM's (default: split, the local APICs; off where KVM emulates kernels)");
        Option<string> engine = Text("--engine", "translator|interpreter|lockstep", "how the software CPU executes (default: translator); lockstep compares the two, with one vCPU");
        Option<string> cpus = Text("--cpus", "N", "processors, 1 to 255 (default: 1)");
        Option<string> memory = Text("--memory", "SIZE", "RAM: 512M, 4G (default: 512M)");
        Option<string> cpu = Text("--cpu", "host|max|NAME[,+FEATURE][,-FEATURE]", "the processor's features (default: max)");
        Option<string> kernel = Text("--kernel", "FILE", "boot this kernel: bzImage, ELF with a PVH note, or multiboot");
        Option<string> initrd = Text("--initrd", "FILE", "its initial file system");
        Option<string> append = Text("--append", "TEXT", "its command line; for the default guest, added to its own");
        Option<string> firmware = Text("--firmware", "bios|FILE", "boot by SeaBIOS (the default for an IMAGE without --kernel), or by the image in this file");
        Option<string> boot = Text("--boot", "disk|cdrom[,...]", "what firmware tries first; a disk's bootindex= comes before (default: disks, then CDs, each as given)");
        Option<string> serial = Text("--serial", "stdio|none|null|file:PATH|unix:PATH", "the first serial port (default: stdio)");
        Option<string> display = Text("--display", "none", "the display (default: none)");
        Option<string[]> devices = new("--device")
        {
            HelpName = "NAME[,KEY=VALUE]",
            Description = "add virtio-rng, virtio-balloon, virtio-scsi, virtio-console,file=|unix=PATH, virtio-port,name=N,file=|unix=PATH, virtio-vsock[,guest-cid=,socket=], isa-debug-exit[,iobase=,iosize=], debugcon[,iobase=,file=] or pc-testdev; repeatable",
            Arity = new ArgumentArity(1, 64),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<string[]> disks = new("--disk")
        {
            HelpName = "PATH[,KEY=VALUE]",
            Description = "add a disk; keys: format, bus=virtio|scsi, readonly, snapshot, cache=writeback|none|writethrough|directsync|unsafe, discard=unmap|ignore, "
                + "serial, id, queues, bootindex, werror|rerror=report|ignore|stop|enospc, bps, iops, logical-block, physical-block; repeatable",
            Arity = new ArgumentArity(1, 64),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<string[]> networks = new("--net")
        {
            HelpName = "KIND[,KEY=VALUE]",
            Description = "add a NIC (default: user); user[,hostfwd=tcp:127.0.0.1:2222-:22][,restrict][,loopback][,net=10.0.2.0/24], "
                + "tap[,ifname=N][,bridge=B][,ip=A/P], socket,listen=PATH|connect=PATH|local=PATH,remote=PATH, none; all take mac=, mtu=, queues=, capture=FILE; repeatable",
            Arity = new ArgumentArity(1, 64),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<string[]> shares = new("--share")
        {
            HelpName = "DIR[,tag=T][,readonly]",
            Description = "let the guest see a folder: mount -t virtiofs T /mnt (T: share, share1, ...); repeatable",
            Arity = new ArgumentArity(1, 16),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<string[]> sshKeys = new("--ssh-key")
        {
            HelpName = "FILE",
            Description = "a public key that opens the guest (default: those in ~/.ssh); repeatable",
            Arity = new ArgumentArity(1, 64),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<string> userData = Text("--user-data", "FILE", "a script or cloud-config that the guest carries out once");
        Option<string> hostName = Text("--hostname", "NAME", "the guest's host name (default: the VM's name)");
        Option<string> size = Text("--size", "SIZE", "the disk of a guest known by name: 20G (default: 10G)");
        Option<string[]> cds = new("--cdrom")
        {
            HelpName = "PATH",
            Description = "add a CD drive with this image in it, on a virtio SCSI controller; repeatable",
            Arity = new ArgumentArity(1, 16),
            AllowMultipleArgumentsPerToken = false,
        };
        Option<bool> noReboot = new("--no-reboot") { Description = "the guest's reset ends the VM" };
        Option<string> log = Text("--log", "vm,kvm,cpu,translator", "to standard error: steps in the VM's life; what KVM could not do; unknown MSRs; the translator's counts");
        Command command = new("run", "Run a virtual machine; with nothing named, a small Linux that is built on first use.")
        {
            image, name, machine, accelerator, engine, cpus, memory, cpu, kernel, initrd, append, firmware, boot, serial, display, disks, cds, networks, shares, sshKeys, userData, hostName, size, devices, noReboot, log,
        };
        command.SetAction(result => run(new RunOptions
        {
            Image = result.GetValue(image),
            Name = result.GetValue(name),
            Machine = result.GetValue(machine),
            Accelerator = result.GetValue(accelerator),
            Engine = result.GetValue(engine),
            Cpus = result.GetValue(cpus),
            Memory = result.GetValue(memory),
            Cpu = result.GetValue(cpu),
            Kernel = result.GetValue(kernel),
            InitialRamdisk = result.GetValue(initrd),
            Append = result.GetValue(append),
            Firmware = result.GetValue(firmware),
            Boot = result.GetValue(boot),
            Serial = result.GetValue(serial),
            Display = result.GetValue(display),
            Disks = result.GetValue(disks) ?? [],
            Networks = result.GetValue(networks) ?? [],
            Shares = result.GetValue(shares) ?? [],
            SshKeys = result.GetValue(sshKeys) ?? [],
            UserData = result.GetValue(userData),
            HostName = result.GetValue(hostName),
            Size = result.GetValue(size),
            Cds = result.GetValue(cds) ?? [],
            Devices = result.GetValue(devices) ?? [],
            NoReboot = result.GetValue(noReboot),
            Log = result.GetValue(log),
        }));
        HelpOption help = new();
        help.Action = new HelpWithExamples(new HelpAction(), RunExamples);
        command.Options.Add(help);
        return command;
    }

    private static Command Ssh()
    {
        Argument<string> name = new("NAME") { Description = "the running VM's name" };
        Argument<string[]> words = new("COMMAND") { Arity = ArgumentArity.ZeroOrMore, Description = "what to run there (default: a shell); put -- before options of its own" };
        Command command = new("ssh", "Log in to a running VM of a guest known by name, or run a command there.") { name, words };
        command.SetAction(result => SshCommand.Execute(result.GetValue(name)!, result.GetValue(words) ?? []));
        return command;
    }

    private static Command Images()
    {
        Command list = new("list", "Show the guests known by name, and the VMs that have a disk over one.");
        list.SetAction(_ => ImageCommand.List());
        Argument<string> built = new("NAME") { Description = "the guest: debian" };
        Command build = new("build", "Build a guest where it is missing, and print its disk image's path.") { built };
        build.SetAction(result => ImageCommand.Build(result.GetValue(built)!));
        Argument<string?> removed = new("NAME") { Arity = ArgumentArity.ZeroOrOne, Description = "the guest, where no VM's disk is over it" };
        Option<string> vm = Text("--vm", "NAME", "the disk and what else a VM keeps");
        Command remove = new("rm", "Remove a built guest, or a VM's disk.") { removed, vm };
        remove.SetAction(result => ImageCommand.Remove(result.GetValue(removed), result.GetValue(vm)));
        return new Command("image", "Guests known by name: build, list and remove them.") { list, build, remove };
    }

    private static Command Doctor(Func<int> doctor)
    {
        Command command = new("doctor", "Say what this host can do, what is missing, and the exact fix.");
        command.SetAction(_ => doctor());
        return command;
    }

    private static Command Guest(Func<string, int> guest)
    {
        Option<string> userland = Text("--userland", "amd64|i386", "the architecture of its programs");
        Command command = new("guest", "Build the default guest where it is missing, and print its kernel's and its initial file system's paths.") { userland };
        // For tests and benchmarks, which give the same guest to other machines.
        command.Hidden = true;
        command.SetAction(result => guest(result.GetValue(userland) ?? "amd64"));
        return command;
    }

    private static Option<string> Text(string name, string value, string description) =>
        new(name) { HelpName = value, Description = description, Arity = ArgumentArity.ExactlyOne };

    /// <summary>The library takes an option that it does not know for the image's name.</summary>
    private static string? MisreadOption(ParseResult result)
    {
        foreach (SymbolResult child in result.CommandResult.Children)
        {
            if (child is ArgumentResult { Tokens: [{ } token] } && token.Value.StartsWith('-'))
                return token.Value;
        }
        return null;
    }

    private static string Describe(ParseResult result)
    {
        string command = result.CommandResult.Command is RootCommand ? "kvasir" : $"kvasir {result.CommandResult.Command.Name}";
        string? stray = MisreadOption(result) ?? (result.UnmatchedTokens.Count > 0 ? result.UnmatchedTokens[0] : null);
        string? option = stray?.Split('=')[0];
        if (option is not null && Promised.Contains(option))
            return $"{option} is not supported yet ({command} --help shows what is)";
        if (stray is not null && stray.StartsWith('-'))
            return $"unknown option '{option}' ({command} --help shows what there is)";
        if (stray is not null)
            return result.CommandResult.Command is RootCommand ? $"unknown command '{stray}' (kvasir --help shows what there is)" : $"one argument too many: '{stray}'";
        if (result.CommandResult.Command is RootCommand)
            return "which command? kvasir run starts a VM, kvasir --help shows what there is";
        foreach (SymbolResult child in result.CommandResult.Children)
        {
            if (child is OptionResult { IdentifierToken: { } token } given && given.Errors.Any())
                return given.Tokens.Count == 0 ? $"{token.Value} needs a value" : $"{token.Value} is given more than once";
        }
        return result.Errors[0].Message;
    }

    /// <summary>The library's help, then examples.</summary>
    private sealed class HelpWithExamples(HelpAction help, string examples) : SynchronousCommandLineAction
    {
        public override int Invoke(ParseResult parseResult)
        {
            int code = help.Invoke(parseResult);
            parseResult.InvocationConfiguration.Output.WriteLine(examples);
            return code;
        }
    }

    private sealed class Saying(Func<string> text) : SynchronousCommandLineAction
    {
        public override int Invoke(ParseResult parseResult)
        {
            parseResult.InvocationConfiguration.Output.WriteLine(text());
            return 0;
        }
    }
}
