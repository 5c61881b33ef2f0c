using System;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>KVM's clock, as guests that know KVM use it.</summary>
[Collection(Rig.OneAtATime)]
public class ClockTests
{
    /// <summary>MSR_KVM_SYSTEM_TIME_NEW: the address of the page that KVM keeps the time in, and bit 0.</summary>
    private const uint SystemTime = 0x4b56_4d01;

    // struct pvclock_vcpu_time_info (Documentation/virt/kvm/x86/msr.rst).
    private const ulong TscTimestamp = SystemBuilder.Scratch + 8;
    private const ulong SystemTimeAt = SystemBuilder.Scratch + 16;
    private const ulong Multiplier = SystemBuilder.Scratch + 24;
    private const ulong Flags = SystemBuilder.Scratch + 29;

    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    public void A_guest_finds_kvm_and_its_clock(KernelIrqChip chip)
    {
        Rig.RequireKvm();
        SystemCase test = Program(a =>
        {
            a.mov(eax, 0x4000_0000);
            a.cpuid();
            a.mov(__dword_ptr[SystemBuilder.Slot(20)], ebx);
            a.mov(__dword_ptr[SystemBuilder.Slot(20) + 4], ecx);
            a.mov(eax, 0x4000_0001);
            a.cpuid();
            a.mov(__dword_ptr[SystemBuilder.Slot(21)], eax);
            SystemBuilder.Exit(a);
        }).Expect("the signature", SystemBuilder.Slot(20), 8, 0x564b_4d56_4b4d_564b).Build("signature");
        using Rig rig = new(irqChip: chip);
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        GuestTests.Check(rig, test);
        ulong features = rig.Qword(SystemBuilder.Slot(21)) & uint.MaxValue;
        Assert.Equal(8ul, features & 8);
        // The end of an interrupt through memory is between the guest and an APIC of KVM's.
        Assert.Equal(chip == KernelIrqChip.Off, (features & 0x40) == 0);
    }

    [Fact]
    public void The_clock_stands_while_the_vm_does_and_ends_with_a_reset()
    {
        Rig.RequireKvm();
        using Rig rig = new();
        Look(rig, start: true);
        ulong first = Now(rig);
        Assert.NotEqual(0u, (uint)rig.Qword(Multiplier));
        Look(rig, start: false);
        ulong second = Now(rig);
        Assert.True(second > first, $"{first} ns, then {second} ns");

        // KVM's clock goes within the time that the VM's goes, however long either waits for a processor.
        rig.Processors.Pause();
        rig.Clock.Pause();
        Thread.Sleep(1000);
        rig.Clock.Resume();
        rig.Processors.Resume();
        Look(rig, start: false);
        ulong third = Now(rig);
        Assert.True(third >= second, $"{second} ns, then {third} ns");
        Assert.InRange(third - first, 0ul, (ulong)rig.Clock.Now + 100_000_000);
        // PVCLOCK_GUEST_STOPPED
        Assert.Equal(2u, (uint)rig.Qword(Flags) & 2);

        rig.Processors.Reset();
        rig.Memory.TryWrite(new Gpa(TscTimestamp), 0ul);
        Look(rig, start: false);
        Assert.Equal(0ul, rig.Qword(TscTimestamp));
    }

    /// <summary>Runs a guest that switches the clock on, or only leaves its counter.</summary>
    private static void Look(Rig rig, bool start)
    {
        SystemCase test = Program(a =>
        {
            if (start)
            {
                a.mov(ecx, SystemTime);
                a.mov(eax, (uint)SystemBuilder.Scratch | 1);
                a.xor(edx, edx);
                a.wrmsr();
            }
            a.rdtsc();
            a.mov(__dword_ptr[SystemBuilder.Slot(22)], eax);
            a.mov(__dword_ptr[SystemBuilder.Slot(22) + 4], edx);
            SystemBuilder.Exit(a);
        }).Build("clock");
        foreach (MemoryImage image in test.Memory)
        {
            if (image.Address is < SystemBuilder.Scratch or >= SystemBuilder.Scratch + 4096)
                Assert.True(rig.Memory.TryWrite(new Gpa(image.Address), image.Bytes));
        }
        rig.Vcpu.GetState(out CpuState now);
        CpuState state = test.Start;
        // The counter goes on: a program that follows another in the same VM.
        state.TscOffset = now.TscOffset;
        rig.Vcpu.SetState(in state);
        Assert.Equal(SystemEnd.Exit, rig.Run());
    }

    /// <summary>The time that the guest makes of the page and its counter.</summary>
    private static ulong Now(Rig rig)
    {
        ulong ticks = rig.Qword(SystemBuilder.Slot(22)) - rig.Qword(TscTimestamp);
        ulong scale = rig.Qword(Multiplier);
        int shift = (sbyte)(scale >> 32);
        ticks = shift >= 0 ? ticks << shift : ticks >> -shift;
        return rig.Qword(SystemTimeAt) + (ulong)((UInt128)ticks * (uint)scale >> 32);
    }

    private static SystemBuilder Program(Action<Assembler> program)
    {
        SystemBuilder b = SystemBuilder.Protected();
        b.Assemble(SystemBuilder.Program, program);
        return b;
    }
}
