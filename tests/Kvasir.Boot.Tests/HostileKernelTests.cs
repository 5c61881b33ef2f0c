using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using Kvasir.Boot.Firmware;
using Kvasir.Boot.Kernels;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Boot.Tests;

/// <summary>Kernel files are hostile input: spoiled ones load or give a <see cref="BootException"/>, and nothing else happens.</summary>
public sealed class HostileKernelTests
{
    private const ulong MiB = 1ul << 20;
    private const int Rounds = 2000;

    /// <summary>Values that bounds are wrong at.</summary>
    private static readonly ulong[] Edges =
    [
        0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x1000, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0xa_0000, 0xf_0000, 0x10_0000, 0x3ff_ffff, 0x400_0000, 0x7fff_ffff, 0x8000_0000,
        0xffff_f000, 0xffff_ffff, 0x1_0000_0000, 0x7fff_ffff_ffff_ffff, 0x8000_0000_0000_0000, 0xffff_ffff_ffff_f000, ulong.MaxValue,
    ];

    public static TheoryData<string> Kinds => ["linux64", "linux32", "pvh32", "pvh64", "multiboot", "aout"];

    private static byte[] Image(string kind)
    {
        byte[] code = new byte[600];
        new Random(7).NextBytes(code);
        return kind switch
        {
            "linux64" => Images.BzImage(codeSize: 0x1000),
            "linux32" => Images.BzImage(0x204, kernel64: false, relocatable: false, codeSize: 0x1000),
            "pvh32" => Images.Elf(false, 0, [new(MiB, code, 2000, MiB), new(2 * MiB, code, 700, 0)], pvhEntry: MiB),
            "pvh64" => Images.Elf(true, 0, [new(MiB, code, 2000, MiB), new(2 * MiB, code, 700, 0)], pvhEntry: MiB),
            "multiboot" => Images.Elf(false, MiB, [new(MiB, [.. Images.MultibootHeader(3), .. code], 2000, MiB)]),
            "aout" => [.. Images.MultibootHeader(0x1_0003, 0x10_0000, 0x10_0000, 0x10_0100, 0x10_2000, 0x10_0020), .. code],
            _ => throw new ArgumentOutOfRangeException(nameof(kind)),
        };
    }

    /// <summary>Where a kind's headers are: most of the spoiling goes there.</summary>
    private static (int Start, int Length) Headers(string kind) => kind switch
    {
        "linux64" or "linux32" => (0x1f1, 0x9f),
        "aout" => (0, 32),
        _ => (0, 240),
    };

    private static byte[] Spoil(byte[] image, string kind, Random random)
    {
        byte[] spoiled = [.. image];
        (int start, int length) = Headers(kind);
        length = Math.Min(length, image.Length - start);
        for (int n = random.Next(1, 4); n > 0; n--)
        {
            int at = start + random.Next(length);
            switch (random.Next(4))
            {
                case 0:
                    spoiled[at] ^= (byte)(1 << random.Next(8));
                    break;
                case 1:
                    spoiled[at] = (byte)random.Next(256);
                    break;
                default:
                    at &= ~3;
                    byte[] edge = BitConverter.GetBytes(Edges[random.Next(Edges.Length)] + (ulong)random.Next(-1, 2));
                    int width = Math.Min(random.Next(2) == 0 ? 4 : 8, spoiled.Length - at);
                    edge.AsSpan(0, width).CopyTo(spoiled.AsSpan(at));
                    break;
            }
        }
        if (random.Next(4) == 0)
            spoiled = spoiled[..random.Next(spoiled.Length + 1)];
        // The multiboot checksum would hide what is behind it.
        if (kind == "aout" && spoiled.Length >= 12 && random.Next(4) != 0)
            Images.Put32(spoiled, 8, (uint)-(0x1bad_b002 + BitConverter.ToUInt32(spoiled, 4)));
        return spoiled;
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void SpoiledKernelsLoadOrAreRefused(string kind)
    {
        const int seed = 20261;
        Random random = new(seed);
        byte[] image = Image(kind);
        using GuestMemory memory = new(64 * MiB);
        BoardDescription board = BoardDescription.Microvm(2);
        int loaded = 0;
        int refused = 0;
        long slowest = 0;
        for (int round = 0; round < Rounds; round++)
        {
            byte[] spoiled = Spoil(image, kind, random);
            long before = Stopwatch.GetTimestamp();
            try
            {
                LoadedKernel kernel = KernelLoader.Load(
                    memory, board, new BootRequest { Kernel = spoiled, CommandLine = "x", Modules = [new BootModule(new byte[100], "")] });
                CheckPlaces(memory, kernel);
                loaded++;
            }
            catch (BootException e)
            {
                Assert.DoesNotContain('\n', e.Message);
                refused++;
            }
            catch (Exception e) when (e is not Xunit.Sdk.XunitException)
            {
                Assert.Fail($"seed {seed}, round {round}: {e}");
            }
            slowest = Math.Max(slowest, Stopwatch.GetTimestamp() - before);
        }
        Assert.True(loaded > 0 && refused > 0, $"seed {seed}: {loaded} loaded, {refused} refused: the spoiling is too weak or too strong");
        Assert.InRange(Stopwatch.GetElapsedTime(0, slowest).TotalSeconds, 0, 5);
    }

    /// <summary>All that was placed is RAM, and no two places overlap.</summary>
    private static void CheckPlaces(GuestMemory memory, LoadedKernel kernel)
    {
        for (int i = 0; i < kernel.Placed.Count; i++)
        {
            PlacedRange placed = kernel.Placed[i];
            Assert.True(memory.IsBacked(placed.Start, placed.Length), placed.ToString());
            Assert.True(i == 0 || kernel.Placed[i - 1].End <= placed.Start, placed.ToString());
        }
        Assert.InRange(kernel.Cpu.Rip, 0ul, uint.MaxValue);
    }

    [Theory]
    [MemberData(nameof(Kinds))]
    public void EveryTruncationLoadsOrIsRefused(string kind)
    {
        byte[] image = Image(kind);
        using GuestMemory memory = new(64 * MiB);
        BoardDescription board = BoardDescription.Microvm(1);
        IEnumerable<int> lengths = Enumerable.Range(0, Math.Min(image.Length, 1300)).Concat(Enumerable.Range(image.Length - 20, 20));
        foreach (int length in lengths)
        {
            Exception? refused = Record.Exception(() => KernelLoader.Load(memory, board, new BootRequest { Kernel = image.AsMemory(0, length) }));
            // All but a run of bytes that is loaded to the file's end needs its last byte.
            Assert.True(refused is BootException || (refused is null && kind == "aout" && length >= 0x100) || (refused is null && length >= image.Length - 15), $"{length}: {refused}");
        }
    }

    [Fact]
    public void SpoiledKernelsForFirmwareAreRefusedLikewise()
    {
        const int seed = 20262;
        Random random = new(seed);
        byte[] image = Image("linux64");
        using GuestMemory memory = new(64 * MiB);
        for (int round = 0; round < Rounds; round++)
        {
            byte[] spoiled = Spoil(image, "linux64", random);
            Exception? refused = Record.Exception(() => FwCfgContent.LinuxBoot(
                memory, new BootRequest { Kernel = spoiled, Modules = [new BootModule(new byte[100])] }));
            Assert.True(refused is null or BootException, $"seed {seed}, round {round}: {refused}");
        }
    }

    [Fact]
    public void ManyProgramHeadersAreRefusedQuickly()
    {
        using GuestMemory memory = new(64 * MiB);
        byte[] image = Images.Elf(true, 0, [.. Enumerable.Range(0, 200).Select(i => new Images.Segment(MiB + (ulong)i, [1], 1, 0))], pvhEntry: MiB);
        string message = Assert.Throws<BootException>(
            () => KernelLoader.Load(memory, BoardDescription.Microvm(1), new BootRequest { Kernel = image })).Message;
        Assert.Contains("program headers", message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void TheSmallestMemoriesGetAClearAnswer(int mebibytes)
    {
        using GuestMemory memory = new((ulong)mebibytes * MiB);
        Exception? refused = Record.Exception(() => KernelLoader.Load(
            memory, BoardDescription.Q35(1, memory.Size), new BootRequest { Kernel = Image("multiboot") }));
        Assert.Equal(mebibytes == 1, refused is BootException);
    }
}
