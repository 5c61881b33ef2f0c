using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Boot.Kernels;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Boot.Tests;

public sealed class LinuxLoaderTests
{
    private const ulong MiB = 1ul << 20;

    private static BoardDescription Board(GuestMemory memory) => BoardDescription.Q35(2, memory.Size);

    private static LoadedKernel Load(GuestMemory memory, byte[] kernel, byte[]? initrd = null, string commandLine = "console=ttyS0") =>
        KernelLoader.Load(memory, Board(memory), new BootRequest
        {
            Kernel = kernel,
            CommandLine = commandLine,
            Modules = initrd is null ? [] : [new BootModule(initrd)],
        });

    private static byte[] Pattern(int size, int seed)
    {
        byte[] bytes = new byte[size];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static void CheckMap(GuestMemory memory, ulong zeroPage, LoadedKernel kernel)
    {
        List<AddressRange> map = [];
        for (int i = 0; i < memory.U8(zeroPage + 0x1e8); i++)
        {
            ulong entry = zeroPage + 0x2d0 + (ulong)i * 20;
            map.Add(new AddressRange(memory.U64(entry), memory.U64(entry + 8), (AddressRangeKind)memory.U32(entry + 16)));
        }
        Assert.Equal(kernel.Map, map);
        Assert.Equal((ushort)0, memory.U8(zeroPage + 0x1ef));
    }

    [Theory]
    [InlineData(64)]
    [InlineData(512)]
    [InlineData(2816)]
    [InlineData(3072)]
    [InlineData(65536)]
    public void StartsA64BitKernelAsTheProtocolSays(int mebibytes)
    {
        using GuestMemory memory = new((ulong)mebibytes * MiB);
        byte[] image = Images.BzImage();
        byte[] initrd = Pattern(123_457, 1);
        LoadedKernel kernel = Load(memory, image, initrd);

        Assert.Equal(KernelKind.Linux, kernel.Kind);
        Assert.Equal("64-bit Linux boot protocol 2.15", kernel.Entry);
        CpuState cpu = kernel.Cpu;
        Assert.Equal(0x100_0200ul, cpu.Rip);
        Assert.Equal(0x8000_0031ul, cpu.Cr0);
        Assert.Equal(0x20ul, cpu.Cr4);
        Assert.Equal(0x500ul, cpu.Efer);
        Assert.Equal(2ul, cpu.Rflags);
        Assert.Equal(0x10, cpu.Cs.Selector);
        Assert.Equal(0xa09bu, cpu.Cs.Attributes);
        foreach (SegmentState data in (SegmentState[])[cpu.Ds, cpu.Es, cpu.Ss])
            Assert.Equal(new SegmentState(0x18, 0, 0xffff_ffff, 0xc093), data);
        Assert.Equal(0x00af_9b00_0000_fffful, memory.U64(cpu.Gdtr.Base + 0x10));
        Assert.Equal(0x00cf_9300_0000_fffful, memory.U64(cpu.Gdtr.Base + 0x18));
        Assert.Equal(47, cpu.Gdtr.Limit);

        ulong page = cpu.Gpr[6];
        foreach (ulong address in (ulong[])[page, 0x100_0200, memory.U32(page + 0x228), memory.U32(page + 0x218), 0, 0xffff_ffff])
            Assert.Equal(address, memory.Translate(cpu.Cr3, address));
        Assert.Null(memory.Translate(cpu.Cr3, 1ul << 32));

        Assert.Equal(image[0x1f1..0x210], memory.Bytes(page + 0x1f1, 0x210 - 0x1f1).Select((b, i) => i is 9 or 10 ? image[0x1f1 + i] : b));
        Assert.Equal(0xff, memory.U8(page + 0x210));
        Assert.Equal(0xffff, memory.U16(page + 0x1fa));
        Assert.Equal("console=ttyS0", memory.Text(memory.U32(page + 0x228)));
        Assert.Equal(image[Images.KernelOffset..], memory.Bytes(0x100_0000, image.Length - Images.KernelOffset));
        Assert.Equal((uint)initrd.Length, memory.U32(page + 0x21c));
        ulong at = memory.U32(page + 0x218);
        Assert.Equal(0ul, at % 4096);
        Assert.InRange(at, 0x180_0000ul, Math.Min(0x8000_0000, memory.LowSize) - (ulong)initrd.Length);
        Assert.Equal(initrd, memory.Bytes(at, initrd.Length));
        Assert.Equal("RSD PTR ", System.Text.Encoding.ASCII.GetString(memory.Bytes(memory.U64(page + 0x70), 8)));
        CheckMap(memory, page, kernel);

        // Nothing that was loaded lies in memory that the map does not give as RAM, but for the tables.
        foreach (PlacedRange placed in kernel.Placed.Where(p => p.What is "kernel" or "initial RAM disk" or "Linux zero page" or "command line" or "page tables"))
            Assert.Contains(kernel.Map, r => r.Kind == AddressRangeKind.Ram && r.Start <= placed.Start && placed.End <= r.End);
        Assert.Equal(639, memory.U16(0x413));
        Assert.Equal(0x9fc0, memory.U16(0x40e));
    }

    [Theory]
    [InlineData(0x200, "32-bit Linux boot protocol 2.00")]
    [InlineData(0x201, "32-bit Linux boot protocol 2.01")]
    [InlineData(0x202, "32-bit Linux boot protocol 2.02")]
    [InlineData(0x203, "32-bit Linux boot protocol 2.03")]
    [InlineData(0x206, "32-bit Linux boot protocol 2.06")]
    [InlineData(0x20a, "32-bit Linux boot protocol 2.10")]
    public void StartsOlderKernelsThroughTheir32BitEntry(int version, string entry)
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] image = Images.BzImage((ushort)version, kernel64: false, relocatable: false, preferred: version >= 0x20a ? 0x10_0000ul : 0);
        LoadedKernel kernel = Load(memory, image, Pattern(5000, 2), "root=/dev/sda1");
        Assert.Equal(entry, kernel.Entry);
        CpuState cpu = kernel.Cpu;
        Assert.Equal(0x10_0000ul, cpu.Rip);
        Assert.Equal(0x11ul, cpu.Cr0);
        Assert.Equal(0ul, cpu.Cr4);
        Assert.Equal(0ul, cpu.Efer);
        Assert.Equal(0xc09bu, cpu.Cs.Attributes);
        Assert.Equal(0x00cf_9b00_0000_fffful, memory.U64(cpu.Gdtr.Base + 0x10));
        for (int i = 0; i < 8; i++)
            Assert.Equal(i == 6 ? 0x9_0000ul : 0, cpu.Gpr[i]);
        Assert.Equal(image[Images.KernelOffset..], memory.Bytes(0x10_0000, image.Length - Images.KernelOffset));
        if (version >= 0x202)
        {
            Assert.Equal("root=/dev/sda1", memory.Text(memory.U32(0x9_0228)));
        }
        else
        {
            Assert.Equal(0xa33f, memory.U16(0x9_0020));
            Assert.Equal("root=/dev/sda1", memory.Text(0x9_0000ul + memory.U16(0x9_0022)));
        }
        Assert.NotEqual(0u, memory.U32(0x9_01e0));
        CheckMap(memory, 0x9_0000, kernel);
    }

    [Fact]
    public void AKernelThatMovesItselfKeepsBothPlaces()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] image = Images.BzImage(relocatable: false, codeSize: 0x4000);
        LoadedKernel kernel = Load(memory, image);
        Assert.Equal(0x10_0200ul, kernel.Cpu.Rip);
        Assert.Contains(kernel.Placed, p => p.Start == 0x10_0000);
        Assert.Contains(kernel.Placed, p => p is { Start: 0x100_0000, Length: 0x80_0000 });
    }

    [Fact]
    public void TheRamDiskStaysBelowTheKernelsLimit()
    {
        using GuestMemory memory = new(1024 * MiB);
        byte[] image = Images.BzImage();
        Images.Put32(image, 0x22c, 0x37ff_ffff);
        Load(memory, image, Pattern(8192, 3));
        Assert.Equal(0x3800_0000u - 8192, memory.U32(0x9_0218));
    }

    [Fact]
    public void SaysWhatDoesNotFit()
    {
        using GuestMemory memory = new(32 * MiB);
        Check("more memory", () => Load(memory, Images.BzImage(initSize: 64 << 20)));
        Check("initial RAM disk", () => Load(memory, Images.BzImage(), new byte[9 << 20]));
        Check("command line", () => Load(memory, Images.BzImage(), commandLine: new string('x', 2048)));
        Check("zero character", () => Load(memory, Images.BzImage(), commandLine: "a\0b"));
        Load(memory, Images.BzImage(), commandLine: new string('x', 2047));
        byte[] image = Images.BzImage();
        Check("truncated", () => Load(memory, image[..^100]));
        Check("truncated", () => Load(memory, image[..600]));
        Check("zImage", () => Load(memory, Spoil(image, 0x211, 0)));
        Check("protocol 3.15", () => Load(memory, Spoil(image, 0x207, 3)));
        Check("power of two", () => Load(memory, Spoil(image, 0x230, 1)));
        Check("above 4 GiB", () => Load(memory, Spoil(image, 0x25c, 1)));
        Check("one initial RAM disk", () => KernelLoader.Load(
            memory, Board(memory), new BootRequest { Kernel = image, Modules = [new BootModule(new byte[1]), new BootModule(new byte[1])] }));

        static void Check(string expected, Action load)
        {
            string message = Assert.Throws<BootException>(load).Message;
            Assert.Contains(expected, message, StringComparison.Ordinal);
            Assert.DoesNotContain('\n', message);
        }

        static byte[] Spoil(byte[] image, int offset, byte value)
        {
            byte[] copy = [.. image];
            copy[offset] = value;
            return copy;
        }
    }

    [Fact]
    public void ASmallMachineIsToldThatTheKernelNeedsMore()
    {
        using GuestMemory memory = new(16 * MiB);
        Assert.Contains("give the VM more memory", Assert.Throws<BootException>(() => Load(memory, Images.BzImage())).Message, StringComparison.Ordinal);
        LoadedKernel kernel = Load(memory, Images.BzImage(preferred: 0x10_0000, initSize: 0x20_0000));
        Assert.Equal(0x20_0200ul, kernel.Cpu.Rip);
    }

    [Fact]
    public void LoadingAgainAfterAResetGivesTheSameMemory()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] image = Images.BzImage();
        LoadedKernel first = Load(memory, image);
        byte[] before = memory.Bytes(0, 0xa_0000);
        byte[] bios = memory.Bytes(0xf_0000, 0x1_0000);
        memory.TryWrite(new Gpa(0x400), Pattern(0x9_f800, 4));
        memory.TryWrite(new Gpa(0xf_0000), Pattern(0x1_0000, 5));
        LoadedKernel second = Load(memory, image);
        // The registers' inline arrays have no equality of their own.
        Assert.Equal(first.Cpu.ToString(), second.Cpu.ToString());
        for (int i = 0; i < 16; i++)
            Assert.Equal(first.Cpu.Gpr[i], second.Cpu.Gpr[i]);
        Assert.Equal(first.Placed, second.Placed);
        foreach (PlacedRange placed in second.Placed.Where(p => p.End <= 0xa_0000 && p.What is not "BIOS data area"))
            Assert.Equal(before[(int)placed.Start..(int)placed.End], memory.Bytes(placed.Start, (int)placed.Length));
        Assert.Equal(bios, memory.Bytes(0xf_0000, 0x1_0000));
    }

    [Theory]
    [InlineData(256)]
    [InlineData(4096)]
    public void StartsADistributionKernel(int mebibytes)
    {
        byte[] image = RealKernel.Cloud64();
        using GuestMemory memory = new((ulong)mebibytes * MiB);
        LoadedKernel kernel = Load(memory, image, Pattern(3 << 20, 6));
        Assert.StartsWith("64-bit", kernel.Entry, StringComparison.Ordinal);
        int offset = (image[0x1f1] + 1) * 512;
        Assert.Equal(image[offset..(offset + 0x1000)], memory.Bytes(kernel.Cpu.Rip - 0x200, 0x1000));
        Assert.Equal(BitConverter.ToUInt32(image, 0x260), kernel.Placed.Single(p => p.What == "kernel").Length);
    }

    [Fact]
    public void StartsADistributionKernelOf32Bits()
    {
        byte[] image = RealKernel.Installer32();
        using GuestMemory memory = new(512 * MiB);
        LoadedKernel kernel = Load(memory, image);
        Assert.StartsWith("32-bit", kernel.Entry, StringComparison.Ordinal);
        Assert.Equal(kernel.Cpu.Rip, memory.U32(kernel.Cpu.Gpr[6] + 0x214));
    }
}
