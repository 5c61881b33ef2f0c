using System;
using Kvasir.X86;
using Xunit;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>
/// Random descriptor tables, task states, page tables, control registers and system instructions: whatever a guest does to itself, the processor
/// answers with a fault or shuts down.
/// </summary>
public class SystemFuzzTests
{
    private const int Machines = 150;
    private const int Steps = 400;

    /// <summary>Opcodes of system instructions; ModRM and what follows are random.</summary>
    private static readonly byte[][] Opcodes =
    [
        [0x0f, 0x00], [0x0f, 0x01], [0x0f, 0x02], [0x0f, 0x03], [0x0f, 0x05], [0x0f, 0x06], [0x0f, 0x07], [0x0f, 0x20], [0x0f, 0x21], [0x0f, 0x22],
        [0x0f, 0x23], [0x0f, 0x30], [0x0f, 0x32], [0x0f, 0x34], [0x0f, 0x35], [0x0f, 0xa0], [0x0f, 0xa1], [0x0f, 0xa2], [0x0f, 0xa8], [0x0f, 0xa9],
        [0x0f, 0xb2], [0x0f, 0xb4], [0x0f, 0xb5], [0x0f, 0xc7], [0x06], [0x07], [0x0e], [0x16], [0x17], [0x1e], [0x1f], [0x62], [0x63], [0x6c], [0x6d],
        [0x6e], [0x6f], [0x8c], [0x8e], [0x9a], [0x9c], [0x9d], [0xc4], [0xc5], [0xca], [0xcb], [0xcc], [0xcd], [0xce], [0xcf], [0xe4], [0xe7], [0xea], [0xec],
        [0xee], [0xf1], [0xfa], [0xfb], [0xff, 0x18], [0xff, 0x28], [0x66, 0xcf], [0x48, 0xcf], [0x48, 0x0f, 0x07], [0x66, 0x9d], [0xf3, 0x6d], [0x0b], [0x89],
    ];

    [Theory]
    [InlineData(0x6b76_6173)]
    [InlineData(0x6972_0001)]
    [InlineData(0x6972_0002)]
    public void Nothing_a_guest_does_to_itself_ends_in_an_exception(int seed)
    {
        Random random = new(seed);
        for (int machine = 0; machine < Machines; machine++)
        {
            SystemBuilder b = random.Next(4) switch
            {
                0 => Real(),
                1 => Protected(),
                2 => random.Next(2) == 0 ? Protected().InUserMode() : Long().InUserMode(),
                _ => Long(),
            };
            Disturb(b, random);
            using SystemRunner.Bench bench = new(b.Build($"fuzz {seed:x} {machine}"));
            try
            {
                bench.Step(Steps);
            }
            catch (Exception e)
            {
                Assert.Fail($"seed {seed:x}h, machine {machine}: {e}\n{bench.Describe()}");
            }
        }
    }

    private static void Disturb(SystemBuilder b, Random random)
    {
        ulong at = b.State.Cs.Base + b.State.Rip;
        for (int i = 0; i < 40; i++)
        {
            foreach (byte x in Opcodes[random.Next(Opcodes.Length)])
                b.Put(at++, x, 1);
            for (int j = random.Next(5); j > 0; j--)
                b.Put(at++, random.Next(3) == 0 ? (ulong)random.Next(256) : (ulong)random.Next(32) * 8, 1);
        }
        for (int i = 0; i < 16; i++)
        {
            if (i != 4)
                b.State.Gpr[i] = random.Next(4) == 0 ? (ulong)random.NextInt64() : (ulong)random.Next(0x200) * 8;
        }
        // A counter that REP string instructions finish soon.
        b.State.Gpr[1] = (ulong)random.Next(64);
        for (int i = random.Next(24); i > 0; i--)
            b.Put(Gdt + (ulong)random.Next(0x100), (ulong)random.Next(256), 1);
        for (int i = random.Next(24); i > 0; i--)
            b.Put(Idt + (ulong)random.Next(0x300), (ulong)random.Next(256), 1);
        for (int i = random.Next(12); i > 0; i--)
            b.Put(Tss + (ulong)random.Next(0x70), (ulong)random.Next(256), 1);
        for (int i = random.Next(4); i > 0; i--)
            b.Put(Tables + (ulong)random.Next(0x4000), (ulong)random.Next(256), 1);
        if (random.Next(3) == 0)
            b.State.Rflags |= 1ul << random.Next(8, 22);
        if (random.Next(3) == 0)
            b.State.Dr7 = (uint)random.Next();
        if (random.Next(4) == 0)
            b.State.Cr4 |= (ulong)(Cr4.VME | Cr4.PVI | Cr4.DE);
        b.State.Star = (ulong)random.NextInt64();
        b.State.Lstar = Program;
        b.State.SysenterCs = (ulong)random.Next(0x100);
        b.State.SysenterEip = Program;
        b.State.SysenterEsp = Stack0;
    }
}
