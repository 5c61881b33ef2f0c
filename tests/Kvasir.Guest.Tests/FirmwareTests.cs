using System;
using System.Buffers.Binary;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Text;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Disk images that boot through SeaBIOS: what is tried first, and a Linux behind GRUB.</summary>
public sealed class FirmwareTests : IDisposable
{
    private const int Sector = 512;
    private const int CdSector = 2048;

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("A", "A", "B,bus=scsi", "C")]
    [InlineData("B", "A", "B,bus=scsi,bootindex=0", "C")]
    [InlineData("C", "A,bootindex=3", "B,bus=scsi,bootindex=2", "C,bootindex=1")]
    [InlineData("D", "F", "B,bus=scsi", "C", "--boot", "cdrom")]
    // What does not boot leaves the turn to the next: by itself (F), or because it has no signature (N).
    [InlineData("FB", "F", "B,bus=scsi", "C", "--boot", "disk")]
    [InlineData("C", "N", "N,bus=scsi", "C")]
    [InlineData("FFC", "F,bootindex=2", "F,bus=scsi,bootindex=1", "C")]
    [InlineData("FFD", "F", "N,bus=scsi", "F", "--boot", "disk")]
    [InlineData("FFA", "A,bootindex=9", "F,bus=scsi,bootindex=5", "F,bootindex=7")]
    [InlineData("FD", "F,bootindex=0", "B,bus=scsi", "C", "--boot", "cdrom")]
    public void Disks_are_tried_in_order(string expected, string first, string second, string third, params string[] more) =>
        BootInOrder([], expected, first, second, third, more);

    /// <summary>SeaBIOS's own drivers, virtio, timer and interrupts, also where the accelerator is KVM.</summary>
    [Theory]
    [InlineData("kvm,kernel-irqchip=off")]
    [InlineData("kvm,kernel-irqchip=split")]
    [InlineData("kvm,kernel-irqchip=on")]
    public void Disks_are_tried_in_order_on(string accelerator)
    {
        EachAccelerator.Require(accelerator);
        BootInOrder(["--accel", accelerator], "FFD", "F", "N,bus=scsi", "F", "--boot", "disk");
    }

    private void BootInOrder(string[] options, string expected, string first, string second, string third, params string[] more)
    {
        string[] disks = [.. new[] { first, second, third }.Index().Select(disk => Disk($"disk{disk.Index}", disk.Item))];
        string console = _folder["console"];
        (int code, _, string error) = KvasirProgram.Run(
            GuestSession.DefaultLimit,
            [
                "run", .. options, "--firmware", "bios", "--serial", "none", "--net", "none", "--device", "isa-debug-exit,iobase=0x501", "--device", $"debugcon,file={console}",
                .. disks.SelectMany(disk => new[] { "--disk", disk }), .. more.Length > 0 ? new[] { "--cdrom", Cd() } : [], .. more,
            ]);
        // Where SeaBIOS is not installed the first run says that it is fetched.
        Assert.Equal((1, ""), (code, string.Concat(error.Split('\n').Where(line => !line.StartsWith("firmware: ", StringComparison.Ordinal)))));
        Assert.Equal(expected, File.ReadAllText(console));
    }

    [Theory]
    [InlineData("virtio", "1", "512M")]
    [InlineData("scsi", "2", "5G")]
    public void A_linux_boots_from_its_disk_through_its_boot_loader(string bus, string cpus, string memory)
    {
        string image = GrubDisk();
        string[] options = ["run", "--cpus", cpus, "--memory", memory];
        // The image as the argument, or as a disk.
        string[] disk = bus == "virtio" ? [image] : ["--firmware", "bios", "--disk", $"{image},format=raw,bus={bus}"];
        using GuestSession guest = GuestSession.Start([.. options, .. disk]);
        guest.Expect("GRUB is here");
        guest.Expect(GuestSession.Prompt);
        Assert.Equal(cpus, guest.Run("nproc"));
        string name = bus == "virtio" ? "vda" : "sda";
        DiskTests.RunUntil(guest, $"[ -b /dev/{name}1 ]");
        Assert.Contains("10.0.2.15", guest.Run("n=0; until ip addr show eth0 | grep 10.0.2.15 || [ $n = 300 ]; do sleep 1; n=$((n+1)); done"), StringComparison.Ordinal);
        guest.CheckKernelLog();
        // Once more, from the reset vector.
        guest.Send("reboot");
        guest.Expect("GRUB is here");
        guest.Expect(GuestSession.Prompt);
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void The_rom_for_further_disks_is_what_its_source_says()
    {
        string roms = Path.Combine(KvasirProgram.Root(), "src/Kvasir.Boot/Firmware/Roms");
        Tool("nasm", "-f", "bin", "-o", _folder["rom"], Path.Combine(roms, "disk.asm"));
        Assert.Equal(File.ReadAllBytes(_folder["rom"]), File.ReadAllBytes(Path.Combine(roms, "disk.bin")));
    }

    /// <summary>A disk of one sector and some room, whose letter tells what was booted; N is empty.</summary>
    private string Disk(string name, string letterAndKeys)
    {
        string[] definitions = letterAndKeys[0] == 'F' ? ["-DLETTER='F'", "-DFAIL"] : [$"-DLETTER='{letterAndKeys[0]}'"];
        byte[] image = new byte[1 << 20];
        if (letterAndKeys[0] != 'N')
            File.ReadAllBytes(Nasm.Assemble(_folder, "sector", definitions)).CopyTo(image, 0);
        File.WriteAllBytes(_folder[name], image);
        return $"{_folder[name]},format=raw{letterAndKeys[1..]}";
    }

    /// <summary>A CD that boots without emulation (El Torito specification 1.0): a primary descriptor, the boot record, the catalog, and a sector of code.</summary>
    private string Cd()
    {
        const int catalog = 19;
        const int code = 20;
        byte[] disc = new byte[64 * CdSector];
        Span<byte> At(int sector) => disc.AsSpan(sector * CdSector);
        Descriptor(At(16), 1);
        Descriptor(At(17), 0);
        Encoding.ASCII.GetBytes("EL TORITO SPECIFICATION", At(17)[7..]);
        BinaryPrimitives.WriteInt32LittleEndian(At(17)[0x47..], catalog);
        Descriptor(At(18), 255);
        // Validation entry: its words add up to zero.
        At(catalog)[0] = 1;
        At(catalog)[30] = 0x55;
        At(catalog)[31] = 0xaa;
        BinaryPrimitives.WriteUInt16LittleEndian(At(catalog)[28..], 0x10000 - 0x0001 - 0xaa55);
        // The initial entry: bootable, no emulation, four sectors of 512 bytes.
        At(catalog)[32] = 0x88;
        BinaryPrimitives.WriteInt16LittleEndian(At(catalog)[38..], 4);
        BinaryPrimitives.WriteInt32LittleEndian(At(catalog)[40..], code);
        File.ReadAllBytes(Nasm.Assemble(_folder, "sector", "-DLETTER='D'")).CopyTo(At(code));
        File.WriteAllBytes(_folder["cd.iso"], disc);
        return _folder["cd.iso"];

        static void Descriptor(Span<byte> target, byte type)
        {
            target[0] = type;
            Encoding.ASCII.GetBytes("CD001", target[1..]);
            target[6] = 1;
        }
    }

    /// <summary>The default guest's kernel on an ext4 file system, behind a partition table and GRUB as grub-install leaves it.</summary>
    private string GrubDisk()
    {
        const int partition = 2048;
        const string platform = "/usr/lib/grub/i386-pc";
        Assert.SkipUnless(File.Exists($"{platform}/boot.img"), "GRUB is not installed (package grub-pc-bin)");
        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        string root = _folder["root"];
        Directory.CreateDirectory($"{root}/boot/grub");
        File.Copy(kernel, $"{root}/boot/vmlinuz");
        File.Copy(initialRamdisk, $"{root}/boot/initrd");
        File.WriteAllText(
            $"{root}/boot/grub/grub.cfg",
            $"serial --unit=0 --speed=115200\nterminal_output serial\necho \"GRUB is here\"\nlinux /boot/vmlinuz {GuestImages.CommandLine}\ninitrd /boot/initrd\nboot\n");
        Tool("grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o", _folder["core"], "biosdisk", "part_msdos", "ext2", "normal", "linux", "serial", "terminal", "echo");
        using (FileStream sized = File.Create(_folder["fs"]))
            sized.SetLength(48 << 20);
        Tool("mke2fs", "-q", "-t", "ext4", "-d", root, _folder["fs"]);
        byte[] first = new byte[Sector];
        File.ReadAllBytes($"{platform}/boot.img").AsSpan(0, 440).CopyTo(first);
        first[446] = 0x80;
        first[450] = 0x83;
        BinaryPrimitives.WriteInt32LittleEndian(first.AsSpan(454), partition);
        BinaryPrimitives.WriteInt32LittleEndian(first.AsSpan(458), (48 << 20) / Sector);
        BinaryPrimitives.WriteUInt16LittleEndian(first.AsSpan(510), 0xaa55);
        using FileStream disk = File.Create(_folder["grub.img"]);
        disk.Write(first);
        // The boot sector looks for the rest in the sectors after it.
        disk.Write(File.ReadAllBytes(_folder["core"]));
        disk.Position = partition * Sector;
        using FileStream files = File.OpenRead(_folder["fs"]);
        files.CopyTo(disk);
        return _folder["grub.img"];
    }

    private static void Tool(string program, params string[] arguments)
    {
        ProcessStartInfo start = new(program, arguments) { RedirectStandardError = true };
        start.Environment["PATH"] = $"{Environment.GetEnvironmentVariable("PATH")}:/usr/sbin:/sbin";
        string path = start.Environment["PATH"]!.Split(':').Select(folder => Path.Combine(folder, program)).FirstOrDefault(File.Exists) ?? "";
        Assert.SkipUnless(path.Length > 0, $"'{program}' is not installed");
        start.FileName = path;
        using Process process = Process.Start(start)!;
        string error = process.StandardError.ReadToEnd();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, $"{program}: {error}");
    }
}
