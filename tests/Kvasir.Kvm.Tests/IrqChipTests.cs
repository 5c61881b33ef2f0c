using System;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using Kvasir.Devices.Chipset;
using Kvasir.Linux;
using Kvasir.Machine;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>The same guests with the interrupt controllers in user space, with the local APICs in the kernel, and with all of them there.</summary>
[Collection(Rig.OneAtATime)]
public class IrqChipTests
{
    private const uint Apic = 0xfee0_0000;
    private const uint IoApicPage = 0xfec0_0000;
    private const int Vector = 0x2d;

    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void A_message_wakes_from_hlt(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        using Rig rig = Start(chip, b.Expect("the vector", SystemBuilder.Slot(0), 4, Vector).Build("message"), out SystemCase test);
        using Timer timer = new(_ => rig.Latch.WritePort(0x82, AccessSize.Byte, Vector), null, 50, Timeout.Infinite);
        Finish(rig, test);
    }

    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void The_timer_interrupts(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            a.mov(__dword_ptr[Apic + 0x3e0], 0xb);
            a.mov(__dword_ptr[Apic + 0x320], Vector);
            a.mov(__dword_ptr[Apic + 0x380], 3_000_000);
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        using Rig rig = Start(chip, b.Expect("the vector", SystemBuilder.Slot(0), 4, Vector).Build("timer"), out SystemCase test);
        Finish(rig, test);
    }

    /// <summary>INIT and start-up from processor to processor, and a fixed interrupt back.</summary>
    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void One_processor_starts_another(KernelIrqChip chip)
    {
        const uint second = 0x7000;
        SystemBuilder b = Program(a =>
        {
            a.mov(__dword_ptr[Apic + 0x310], 1 << 24);
            a.mov(__dword_ptr[Apic + 0x300], 0x4500);
            a.mov(__dword_ptr[Apic + 0x300], 0x4600 | (int)(second >> 12));
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        // In real mode a word of the APIC's page is out of reach: it writes and asks for the interrupt through a port.
        b.Assemble(second, a =>
        {
            Label here = a.CreateLabel();
            a.mov(__word_ptr[(ushort)SystemBuilder.Slot(20)], 0x55);
            a.mov(al, Vector);
            a.@out(0x82, al);
            a.Label(ref here);
            a.jmp(here);
        }, 16);
        SystemCase built = b.Expect("the vector", SystemBuilder.Slot(0), 4, Vector).Expect("what the second one wrote", SystemBuilder.Slot(20), 2, 0x55).Build("start-up");
        using Rig rig = Start(chip, built, out SystemCase test, vcpus: 2);
        CpuState waiting = CpuState.AtReset();
        waiting.Activity = VcpuActivity.WaitForSipi;
        rig.Vcpus[1].SetState(in waiting);
        rig.Vcpus[1].GetState(out CpuState seen);
        Assert.Equal(VcpuActivity.WaitForSipi, seen.Activity);
        Thread thread = new(() => rig.Vcpus[1].Run());
        thread.Start();
        Finish(rig, test);
        rig.Vcpus[1].Kick();
        Assert.True(thread.Join(TimeSpan.FromSeconds(120)), "a kick was lost");
    }

    /// <summary>The end of a level-triggered interrupt comes back to the I/O APIC, which sends again while the level is there.</summary>
    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void A_level_comes_again_until_it_goes(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            Label wait = a.CreateLabel();
            a.mov(__dword_ptr[IoApicPage], 0x30);
            a.mov(__dword_ptr[IoApicPage + 0x10], 0x8000 | Vector);
            a.mov(al, 1);
            a.@out(0x84, al);
            a.sti();
            a.Label(ref wait);
            a.cmp(__dword_ptr[SystemBuilder.Slot(20)], 3);
            a.jb(wait);
            a.mov(ecx, 50_000);
            Label more = a.CreateLabel();
            a.Label(ref more);
            a.dec(ecx);
            a.jne(more);
            SystemBuilder.Exit(a);
        });
        Handler(b, Vector, a =>
        {
            Label keep = a.CreateLabel();
            a.inc(__dword_ptr[SystemBuilder.Slot(20)]);
            a.cmp(__dword_ptr[SystemBuilder.Slot(20)], 3);
            a.jb(keep);
            a.xor(eax, eax);
            a.@out(0x84, al);
            a.Label(ref keep);
            a.mov(__dword_ptr[Apic + 0xb0], 0);
            a.iretd();
        });
        using Rig rig = Start(chip, b.Build("level"), out SystemCase test);
        Finish(rig, test);
        // A KVM that emulates kernels was seen to end an interrupt as it delivers it (its in-service register stays empty): one more is on its way then.
        ulong most = Rig.Probe.IsHardware || chip == KernelIrqChip.Off ? 3u : 4u;
        Assert.InRange((uint)rig.Qword(SystemBuilder.Slot(20)), 3u, most);
    }

    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void The_8259s_interrupt_through_LINT0(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            InitializePic(a, mask: 0xf7);
            a.mov(al, 1);
            a.@out(0x85, al);
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        using Rig rig = Start(chip, b.Expect("the vector", SystemBuilder.Slot(0), 4, 0x23).Build("8259"), out SystemCase test);
        Finish(rig, test);
    }

    /// <summary>An instruction that KVM gives up on may end an interrupt, at an APIC that stands in for KVM's.</summary>
    [Fact]
    public void A_level_is_ended_in_the_kernel()
    {
        Rig.RequireKvm();
        using Rig rig = new(irqChip: KernelIrqChip.On);
        WiredControllers wired = rig.Processors.TakeControllers()!.Wired!;
        IoApic.State state = wired.IoApic;
        // Level-triggered and under way: pins 16 and 18 with one vector, 17 with another.
        const ulong entry = 1 << 15 | 1 << 14;
        (state.Table[16], state.Table[17], state.Table[18]) = (entry | Vector, entry | 0x41, entry | Vector);
        rig.Processors.GiveControllers(rig.Processors.TakeControllers()! with { Wired = wired with { IoApic = state } });
        rig.Interrupts!.EndLevel(Vector);
        IoApic.State after = rig.Processors.TakeControllers()!.Wired!.IoApic;
        Assert.Equal((0x8000ul | Vector, entry | 0x41, 0x8000ul | Vector), (after.Table[16], after.Table[17], after.Table[18]));
        Assert.Equal(state.Table[3], after.Table[3]);
    }

    [Fact]
    public void The_kernels_pit_interrupts()
    {
        SystemBuilder b = Program(a =>
        {
            InitializePic(a, mask: 0xfe);
            // Counter 0, both bytes, interrupt on terminal count.
            a.mov(al, 0x30);
            a.@out(0x43, al);
            a.mov(al, 0);
            a.@out(0x40, al);
            a.mov(al, 8);
            a.@out(0x40, al);
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        using Rig rig = Start(KernelIrqChip.On, b.Expect("the vector", SystemBuilder.Slot(0), 4, 0x20).Build("PIT"), out SystemCase test);
        Finish(rig, test);
    }

    [Theory]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void An_event_descriptor_interrupts_from_inside_the_kernel(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        using Rig rig = Start(chip, b.Expect("the vector", SystemBuilder.Slot(0), 4, Vector).Build("irqfd"), out SystemCase test);
        using EventFd other = new();
        using EventFd signal = new();
        using IDisposable first = rig.Interrupts!.Attach(other, Apic, 0x2c);
        using IDisposable second = rig.Interrupts.Attach(signal, Apic, Vector);
        first.Dispose();
        other.Signal();
        using Timer timer = new(_ => signal.Signal(), null, 50, Timeout.Infinite);
        Finish(rig, test);
    }

    /// <summary>What KVM gives up on may touch the local APIC, wherever that is.</summary>
    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void A_rescued_instruction_reaches_the_local_APIC(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a =>
        {
            a.movd(xmm1, __dword_ptr[Apic + 0x30]);
            a.movd(eax, xmm1);
            a.and(eax, 0xff);
            a.mov(__dword_ptr[SystemBuilder.Slot(20)], eax);
            // The task priority, which MOV shows again.
            a.mov(eax, 0x50);
            a.movd(xmm1, eax);
            a.movd(__dword_ptr[Apic + 0x80], xmm1);
            a.mov(eax, __dword_ptr[Apic + 0x80]);
            a.mov(__dword_ptr[SystemBuilder.Slot(21)], eax);
            SystemBuilder.Exit(a);
        });
        b.State.Cr4 |= 1 << 9;
        SystemCase built = b.Expect("the version", SystemBuilder.Slot(20), 4, 0x14).Expect("the task priority", SystemBuilder.Slot(21), 4, 0x50).Build("rescue at the APIC");
        using Rig rig = Start(chip, built, out SystemCase test);
        Finish(rig, test);
        Assert.True(Rig.Probe.IsHardware || rig.Rescued > 0, "this host's KVM used to give up on MOVD");
    }

    [Theory]
    [InlineData(KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void A_kick_and_an_NMI_wake_from_hlt(KernelIrqChip chip)
    {
        SystemBuilder b = Program(a => a.hlt());
        using Rig rig = Start(chip, b.Expect("the vector", SystemBuilder.Slot(0), 4, 2).Build("NMI in HLT"), out SystemCase test);
        using (Timer kick = new(static v => ((IVcpu)v!).Kick(), rig.Vcpu, 20, Timeout.Infinite))
            Assert.Equal(VcpuExit.Kicked, rig.Vcpu.Run());
        // Not before it halts: what was kicked may not have run yet.
        CpuState state;
        do
        {
            using Timer kick = new(static v => ((IVcpu)v!).Kick(), rig.Vcpu, 20, Timeout.Infinite);
            Assert.Equal(VcpuExit.Kicked, rig.Vcpu.Run());
            rig.Vcpu.GetState(out state);
        }
        while (state.Activity == VcpuActivity.Active);
        Assert.Equal(VcpuActivity.Halted, state.Activity);
        rig.Vcpu.SetState(in state);
        rig.Vcpu.Nmi();
        Finish(rig, test);
    }

    [Theory]
    [InlineData(KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On)]
    public void Each_call_that_fails_gives_a_clear_error_and_leaks_nothing(KernelIrqChip chip)
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Mix("real", 3);
        FailingCalls counting = new(int.MaxValue, 0);
        Assert.Null(Attempt(counting, test, chip));
        Assert.Equal(0, counting.Open);
        for (int i = 0; i < counting.Count; i++)
        {
            FailingCalls calls = new(i, 5);
            string? error = Attempt(calls, test, chip);
            Assert.Equal(0, calls.Open);
            // How often the vCPU is entered is up to signals that come, so the last of the calls need not come each time.
            if (!calls.Fired)
            {
                Assert.True(i > counting.Count * 9 / 10, $"call {i} of {counting.Count} was not reached");
                break;
            }
            // A capability or a register that KVM does not take is done without.
            if (error is not null)
                Assert.True(error.Length > 10 && (error.Contains("error", StringComparison.OrdinalIgnoreCase) || error.Contains("does not", StringComparison.Ordinal)), $"call {i}: {error}");
        }
    }

    private static string? Attempt(FailingCalls calls, SystemCase test, KernelIrqChip chip)
    {
        try
        {
            using Rig rig = new(calls: calls, irqChip: chip);
            rig.Load(test);
            VcpuExit exit = rig.Vcpu.Run();
            return exit == VcpuExit.Failure ? rig.Vcpu.FailureReport : null;
        }
        catch (LinuxException e)
        {
            return e.Message;
        }
    }

    /// <summary>Counts the PIT's interrupts in slot 20 and those of the APIC's timer in slot 21 up to a number of both, then one of I/O APIC pin 16 in slot 22.</summary>
    internal static SystemCase TimersAndPin(int ticks)
    {
        const int pitVector = 0x20;
        const int pinVector = 0x2e;
        SystemBuilder b = Program(a =>
        {
            Label wait = a.CreateLabel();
            Label last = a.CreateLabel();
            InitializePic(a, mask: 0xfe);
            // Counter 0, both bytes, rate generator: 5 ms.
            a.mov(al, 0x34);
            a.@out(0x43, al);
            a.mov(al, 0x4e);
            a.@out(0x40, al);
            a.mov(al, 0x17);
            a.@out(0x40, al);
            a.mov(__dword_ptr[IoApicPage], 0x30);
            a.mov(__dword_ptr[IoApicPage + 0x10], pinVector);
            a.mov(__dword_ptr[Apic + 0x3e0], 0xb);
            a.mov(__dword_ptr[Apic + 0x320], Vector | 1 << 17);
            a.mov(__dword_ptr[Apic + 0x380], 5_000_000);
            a.sti();
            a.Label(ref wait);
            a.hlt();
            a.cmp(__dword_ptr[SystemBuilder.Slot(20)], ticks);
            a.jb(wait);
            a.cmp(__dword_ptr[SystemBuilder.Slot(21)], ticks);
            a.jb(wait);
            a.mov(al, 1);
            a.@out(0x84, al);
            a.Label(ref last);
            a.cmp(__dword_ptr[SystemBuilder.Slot(22)], 0);
            a.je(last);
            SystemBuilder.Exit(a);
        });
        Handler(b, pitVector, a =>
        {
            a.push(eax);
            a.inc(__dword_ptr[SystemBuilder.Slot(20)]);
            a.mov(al, 0x20);
            a.@out(0x20, al);
            a.pop(eax);
            a.iretd();
        }, 0x7800);
        Handler(b, Vector, a => CountAndEnd(a, 21), 0x7840);
        Handler(b, pinVector, a => CountAndEnd(a, 22), 0x7880);
        return b.Build("timers and a pin");
    }

    private static void CountAndEnd(Assembler a, int slot)
    {
        a.inc(__dword_ptr[SystemBuilder.Slot(slot)]);
        a.mov(__dword_ptr[Apic + 0xb0], 0);
        a.iretd();
    }

    private static void InitializePic(Assembler a, int mask)
    {
        ReadOnlySpan<(int Port, int Value)> words = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1), (0x21, mask), (0xa1, 0xff)];
        foreach ((int port, int value) in words)
        {
            a.mov(al, (sbyte)value);
            a.@out((byte)port, al);
        }
        a.mov(__dword_ptr[Apic + 0x350], 0x700);
    }

    /// <summary>32-bit code without paging reaches everything.</summary>
    private static SystemBuilder Program(Action<Assembler> program)
    {
        SystemBuilder b = SystemBuilder.Protected();
        b.Assemble(SystemBuilder.Program, program);
        return b;
    }

    /// <summary>Puts a handler of one's own in place of the one that records and ends.</summary>
    private static void Handler(SystemBuilder b, int vector, Action<Assembler> code, uint place = 0x7800)
    {
        b.Assemble(place, code);
        b.Gate32(vector, SystemBuilder.Code32, place, 0x8e);
    }

    private static Rig Start(KernelIrqChip chip, SystemCase built, out SystemCase test, int vcpus = 1)
    {
        Rig.RequireKvm();
        test = built;
        Rig rig = new(vcpus: vcpus, irqChip: chip);
        rig.Load(test);
        return rig;
    }

    private static void Finish(Rig rig, SystemCase test)
    {
        SystemEnd? end = rig.Run();
        rig.Vcpu.GetState(out CpuState state);
        Assert.True(end == SystemEnd.Exit, $"{end}: EIP {state.Rip:x}, EFLAGS {state.Rflags:x}, {state.Activity}, slot 0 {rig.Qword(SystemBuilder.Slot(0)):x}, slot 20 {rig.Qword(SystemBuilder.Slot(20)):x}");
        GuestTests.Check(rig, test);
    }
}
