using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Kvasir.Boot.Kernels;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Boot.Tests;

public sealed class ElfLoadersTests
{
    private const ulong MiB = 1ul << 20;

    private static byte[] Pattern(int size, int seed)
    {
        byte[] bytes = new byte[size];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static LoadedKernel Load(GuestMemory memory, byte[] kernel, string commandLine = "", params BootModule[] modules) =>
        KernelLoader.Load(memory, BoardDescription.Q35(2, memory.Size), new BootRequest
        {
            Kernel = kernel,
            KernelName = "/k",
            CommandLine = commandLine,
            Modules = modules,
        });

    private static void CheckProtected32(CpuState cpu, ulong entry)
    {
        Assert.Equal(entry, cpu.Rip);
        Assert.Equal(0x11ul, cpu.Cr0);
        Assert.Equal(0ul, cpu.Cr4);
        Assert.Equal(2ul, cpu.Rflags);
        Assert.Equal((0ul, 0xffff_ffffu, 0xc09bu), (cpu.Cs.Base, cpu.Cs.Limit, cpu.Cs.Attributes));
        foreach (SegmentState data in (SegmentState[])[cpu.Ds, cpu.Es, cpu.Ss, cpu.Fs, cpu.Gs])
            Assert.Equal((0ul, 0xffff_ffffu, 0xc093u), (data.Base, data.Limit, data.Attributes));
        Assert.Equal((0ul, 0x67u, 0x8bu), (cpu.Tr.Base, cpu.Tr.Limit, cpu.Tr.Attributes));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void StartsAPvhKernel(bool wide)
    {
        using GuestMemory memory = new(128 * MiB);
        byte[] code = Pattern(10_000, 1);
        byte[] data = Pattern(3_001, 2);
        byte[] image = Images.Elf(wide, 0, [new(0x10_0000, code, 20_000, 0xc010_0000), new(0x20_0000, data, 3_001, 0xc020_0000)], pvhEntry: 0x10_0010);
        memory.TryWrite(new Gpa(0x10_0000), Pattern(0x8000, 3));
        byte[] first = Pattern(5000, 4);
        LoadedKernel kernel = Load(memory, image, "a=b", new BootModule(first, "first module"), new BootModule(ReadOnlyMemory<byte>.Empty));
        Assert.Equal(KernelKind.Pvh, kernel.Kind);
        CheckProtected32(kernel.Cpu, 0x10_0010);
        Assert.Equal(code, memory.Bytes(0x10_0000, code.Length));
        Assert.Equal(new byte[10_000], memory.Bytes(0x10_0000 + 10_000, 10_000));
        Assert.Equal(data, memory.Bytes(0x20_0000, data.Length));

        ulong info = kernel.Cpu.Gpr[3];
        Assert.Equal(0x336e_c578u, memory.U32(info));
        Assert.Equal(1u, memory.U32(info + 4));
        Assert.Equal(2u, memory.U32(info + 12));
        ulong list = memory.U64(info + 16);
        Assert.Equal(first, memory.Bytes(memory.U64(list), (int)memory.U64(list + 8)));
        Assert.Equal(0ul, memory.U64(list) % 4096);
        Assert.Equal("first module", memory.Text(memory.U64(list + 16)));
        Assert.Equal(0ul, memory.U64(list + 32 + 8));
        Assert.Equal(0ul, memory.U64(list + 32 + 16));
        Assert.Equal("a=b", memory.Text(memory.U64(info + 24)));
        Assert.Equal("RSD PTR ", System.Text.Encoding.ASCII.GetString(memory.Bytes(memory.U64(info + 32), 8)));
        ulong map = memory.U64(info + 40);
        IEnumerable<AddressRange> entries = Enumerable.Range(0, (int)memory.U32(info + 48)).Select(i =>
            new AddressRange(memory.U64(map + (ulong)i * 24), memory.U64(map + (ulong)i * 24 + 8), (AddressRangeKind)memory.U32(map + (ulong)i * 24 + 16)));
        Assert.Equal(kernel.Map, entries);
    }

    /// <summary>A distribution's vmlinux, taken out of its bzImage, has a PVH note of the real kind.</summary>
    [Fact]
    public void StartsADistributionKernelThroughPvh()
    {
        byte[] image = RealKernel.Cloud64();
        int offset = (image[0x1f1] + 1) * 512 + (int)BitConverter.ToUInt32(image, 0x248);
        int length = (int)BitConverter.ToUInt32(image, 0x24c);
        using TemporaryFolder folder = new();
        folder.Write("payload", image.AsSpan(offset, length));
        string? unpacker = image[offset] switch { 0xfd => "xz", 0x02 => "lz4", 0x28 => "zstd", 0x1f => "gzip", _ => null };
        if (unpacker is null)
            Assert.Skip("the distribution's kernel is compressed in another way");
        if (!ExternalTool.IsInstalled(unpacker))
            Assert.Skip($"'{unpacker}' is not installed");
        // The payload ends with the size of what is in it, which is no part of the compressed stream.
        (int code, string output) = ExternalTool.Run("dash", folder.Path, "sh", "-c", $"head -c -4 payload | {unpacker} -dc > vmlinux");
        Assert.True(code == 0, output);
        byte[] vmlinux = File.ReadAllBytes(Path.Combine(folder.Path, "vmlinux"));
        using GuestMemory memory = new(512 * MiB);
        LoadedKernel kernel = Load(memory, vmlinux, "console=ttyS0", new BootModule(Pattern(100_000, 5)));
        Assert.Equal("ELF64 with a PVH entry", kernel.Entry);
        Assert.InRange(kernel.Cpu.Rip, 0x100_0000ul, 0x800_0000ul);
        // The entry is code: it starts with cld.
        Assert.Equal(0xfc, memory.U8(kernel.Cpu.Rip));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void StartsAMultibootElf(bool wide)
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] code = [.. Images.MultibootHeader(3), .. Pattern(5_000, 1)];
        byte[] image = Images.Elf(wide, 0x8010_0020, [new(0x10_0000, code, (ulong)code.Length + 100, 0x8010_0000)]);
        LoadedKernel kernel = Load(memory, image, "x y", new BootModule(Pattern(4097, 2), "a arg"), new BootModule(Pattern(10, 3), "b arg"));
        Assert.Equal(KernelKind.Multiboot, kernel.Kind);
        CheckProtected32(kernel.Cpu, 0x10_0020);
        Assert.Equal(0x2bad_b002ul, kernel.Cpu.Gpr[0]);
        ulong info = kernel.Cpu.Gpr[3];
        Assert.Equal(0x24du, memory.U32(info));
        Assert.Equal(639u, memory.U32(info + 4));
        Assert.Equal((uint)(kernel.Map.Single(r => r is { Start: MiB }).Length / 1024), memory.U32(info + 8));
        Assert.Equal("/k x y", memory.Text(memory.U32(info + 16)));
        Assert.Equal(2u, memory.U32(info + 20));
        ulong modules = memory.U32(info + 24);
        Assert.Equal(4097u, memory.U32(modules + 4) - memory.U32(modules));
        Assert.Equal(Pattern(4097, 2), memory.Bytes(memory.U32(modules), 4097));
        Assert.Equal("a arg", memory.Text(memory.U32(modules + 8)));
        Assert.Equal(Pattern(10, 3), memory.Bytes(memory.U32(modules + 16), 10));
        Assert.Equal("b arg", memory.Text(memory.U32(modules + 24)));
        Assert.Equal(0u, memory.U32(modules + 16) % 4096);
        ulong map = memory.U32(info + 48);
        List<AddressRange> ranges = [];
        for (ulong at = map; at < map + memory.U32(info + 44); at += memory.U32(at) + 4)
            ranges.Add(new AddressRange(memory.U64(at + 4), memory.U64(at + 12), (AddressRangeKind)memory.U32(at + 20)));
        Assert.Equal(kernel.Map, ranges);
        Assert.Equal("Kvasir", memory.Text(memory.U32(info + 64)));
        Assert.Equal(code, memory.Bytes(0x10_0000, code.Length));
    }

    [Fact]
    public void StartsAMultibootImageByItsAddresses()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] before = Pattern(64, 1);
        byte[] after = Pattern(3000, 2);
        // Sixteen of the bytes before the header belong to the image, and the last hundred do not.
        uint header = 0x20_0010;
        uint load = 0x20_0000;
        uint loadEnd = load + 16 + 32 + 2900;
        byte[] image = [.. before, .. Images.MultibootHeader(0x1_0000, header, load, loadEnd, loadEnd + 500, 0x20_0030), .. after];
        memory.TryWrite(new Gpa(load), Pattern(8000, 3));
        LoadedKernel kernel = Load(memory, image);
        CheckProtected32(kernel.Cpu, 0x20_0030);
        Assert.Equal(image[48..(48 + 2948)], memory.Bytes(load, 2948));
        Assert.Equal(new byte[500], memory.Bytes(loadEnd, 500));
        Assert.Equal("/k", memory.Text(memory.U32(kernel.Cpu.Gpr[3] + 16)));
        Assert.Equal(0u, memory.U32(kernel.Cpu.Gpr[3]) & 8);

        byte[] whole = [.. Images.MultibootHeader(0x1_0000, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020), .. after];
        Load(memory, whole);
        Assert.Equal(whole, memory.Bytes(0x10_0000, whole.Length));
    }

    [Fact]
    public void LoaderDataKeepsClearOfAKernelInConventionalMemory()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] code = [.. Images.MultibootHeader(0), .. Pattern(0x2_0000, 1)];
        LoadedKernel kernel = Load(memory, Images.Elf(false, 0x4010, [new(0x4000, code, (ulong)code.Length, 0x4000)]), "x", new BootModule(Pattern(9, 2), "m"));
        Assert.Equal(code, memory.Bytes(0x4000, code.Length));
        for (int i = 1; i < kernel.Placed.Count; i++)
            Assert.True(kernel.Placed[i - 1].End <= kernel.Placed[i].Start);
        Assert.Equal("/k x", memory.Text(memory.U32(kernel.Cpu.Gpr[3] + 16)));
    }

    [Fact]
    public void ThePvhNoteComesBeforeTheMultibootHeader()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] code = [.. Images.MultibootHeader(0), .. Pattern(100, 1)];
        byte[] image = Images.Elf(false, 0x10_0000, [new(0x10_0000, code, 112, 0x10_0000)], pvhEntry: 0x10_0020);
        Assert.Equal(KernelKind.Pvh, Load(memory, image).Kind);
    }

    [Fact]
    public void SaysWhatIsWrong()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] code = Pattern(100, 1);
        Images.Segment At(ulong address, ulong size = 100) => new(address, code, size, address);
        Check("neither a PVH note nor a multiboot", Images.Elf(true, 0, [At(MiB)]));
        Check("more memory", Images.Elf(true, 0, [At(64 * MiB)], pvhEntry: MiB));
        Check("more memory", Images.Elf(true, 0, [At(MiB, 64 * MiB)], pvhEntry: MiB));
        Check("more memory", Images.Elf(true, 0, [At(0xa_0000)], pvhEntry: MiB));
        Check("more memory", Images.Elf(true, 0, [At(ulong.MaxValue - 10)], pvhEntry: MiB));
        Check("overwrite the BIOS segment", Images.Elf(true, 0, [At(0xf_0000)], pvhEntry: MiB));
        Check("overwrite the ACPI tables", Images.Elf(true, 0, [At(64 * MiB - 200)], pvhEntry: MiB));
        Check("overwrite the kernel", Images.Elf(true, 0, [At(MiB), At(MiB + 50)], pvhEntry: MiB));
        Check("PVH entry", Images.Elf(true, 0, [At(MiB)], pvhEntry: 0xb000_0000));
        Check("truncated", Images.Elf(true, 0, [At(MiB)], pvhEntry: MiB)[..^10]);
        Check("truncated", Images.Elf(true, 0, [At(MiB)], pvhEntry: MiB)[..55]);
        byte[] other = Images.Elf(true, 0, [At(MiB)], pvhEntry: MiB);
        other[18] = 183;
        Check("e_machine 183", other);
        other[5] = 2;
        Check("byte order", other);
        Check("features that do not exist", [.. Images.MultibootHeader(0x10), .. code]);
        Check("neither ELF nor", [.. Images.MultibootHeader(0), .. code]);
        Check("contradict", [.. Images.MultibootHeader(0x1_0000, 0x10_0000, 0x20_0000, 0, 0, 0), .. code]);
        Check("truncated", [.. Images.MultibootHeader(0x1_0000, 0x10_0000, 0x10_0000, 0x20_0000, 0, 0), .. code]);
        Check("truncated", Images.MultibootHeader(0x1_0000, 0x10_0000));
        Check("bss end", [.. Images.MultibootHeader(0x1_0000, 0x10_0000, 0x10_0000, 0, 0x10_0001, 0), .. code]);
        Check("entry 0xc0000000", [.. Images.MultibootHeader(0x1_0000, 0x10_0000, 0x10_0000, 0, 0, 0xc000_0000), .. code]);
        Check("empty", []);
        Check("gzip", [0x1f, 0x8b, 8, 0]);
        Check("no kernel that can be started", new byte[5000]);
        Check("EFI or DOS", [.. "MZ"u8, .. new byte[2000]]);

        byte[] multiboot = Images.Elf(false, MiB, [At(MiB) with { Content = [.. Images.MultibootHeader(0), .. code], MemorySize = 112 }]);
        Assert.Contains(
            "module of 63 MiB does not fit",
            Assert.Throws<BootException>(() => Load(memory, multiboot, "", new BootModule(new byte[63 << 20]))).Message,
            StringComparison.Ordinal);

        void Check(string expected, byte[] kernel)
        {
            string message = Assert.Throws<BootException>(() => Load(memory, kernel)).Message;
            Assert.Contains(expected, message, StringComparison.Ordinal);
            Assert.DoesNotContain('\n', message);
        }
    }
}
