using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Cpu.Tests.Privileged;
using Kvasir.Devices.Chipset;
using Kvasir.Machine;
using Xunit;

namespace Kvasir.Kvm.Tests;

/// <summary>State goes from one accelerator to the other in the middle of a program, and the result is the same.</summary>
[Collection(Rig.OneAtATime)]
public class CrossingTests
{
    [Theory]
    [InlineData("real")]
    [InlineData("protected")]
    [InlineData("long")]
    [InlineData("ring 3")]
    public void From_the_software_cpu_to_kvm(string mode)
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Mix(mode, 300);
        using Rig soft = new(kvm: false);
        soft.Load(test);
        for (int i = 0; i < 500; i++)
            Assert.Null(((SoftVcpu)soft.Vcpu).Step());
        using Rig kvm = new();
        Move(soft, kvm);
        Assert.Equal(SystemEnd.Exit, kvm.Run());
        GuestTests.Check(kvm, test);
    }

    [Theory]
    [InlineData("real")]
    [InlineData("protected")]
    [InlineData("long")]
    [InlineData("ring 3")]
    public void From_kvm_to_the_software_cpu(string mode)
    {
        Rig.RequireKvm();
        // Long enough not to end before the kick, also where ring 3 is native.
        SystemCase test = Programs.Mix(mode, mode == "ring 3" ? 50_000_000 : 30_000);
        using Rig kvm = new();
        kvm.Load(test);
        using (System.Threading.Timer timer = new(static v => ((IVcpu)v!).Kick(), kvm.Vcpu, 5, System.Threading.Timeout.Infinite))
            Assert.Equal(VcpuExit.Kicked, kvm.Vcpu.Run());
        Assert.False(kvm.Exited, "the program ended before it could be moved");
        using Rig soft = new(kvm: false);
        Move(kvm, soft);
        Assert.Equal(SystemEnd.Exit, soft.Run());
        GuestTests.Check(soft, test);
    }

    [Fact]
    public void What_is_put_in_comes_out()
    {
        Rig.RequireKvm();
        using Rig rig = new();
        CpuState state = Programs.Mix("long", 1).Start;
        for (int i = 0; i < 16; i++)
            state.Gpr[i] = 0x0123_4567_89ab_0000ul + (ulong)i;
        state.Rflags = 0xad7;
        state.Cr2 = 0xffff_8000_1234_5678;
        state.Dr0 = 0x1234;
        state.Star = 0x0023_0010_0000_0000;
        state.Lstar = 0xffff_ffff_8100_0000;
        state.Fmask = 0x4_7700;
        state.KernelGsBase = 0xffff_8880_0000_0000;
        state.SysenterEip = 0xffff_ffff_8200_0000;
        state.MtrrDefType = 0xc06;
        state.MtrrFixed[2] = 0x0606_0606_0606_0606;
        state.MtrrVariable[0] = 0xc000_0006;
        state.Fs.Base = 0x7fff_1234_5000;
        state.NmiBlocked = true;
        for (int i = 20; i < 52; i++)
            state.Xsave[i] = 0x1111_1111_1111_1111ul * (ulong)(i % 15);
        rig.Vcpu.SetState(in state);
        rig.Vcpu.GetState(out CpuState back);
        Assert.Equal(state.Gpr[..].ToArray(), back.Gpr[..].ToArray());
        Assert.Equal((state.Rip, state.Rflags, state.Cs, state.Ss, state.Fs, state.Gdtr, state.Idtr), (back.Rip, back.Rflags, back.Cs, back.Ss, back.Fs, back.Gdtr, back.Idtr));
        Assert.Equal((state.Cr0, state.Cr2, state.Cr3, state.Cr4, state.Efer), (back.Cr0, back.Cr2, back.Cr3, back.Cr4, back.Efer));
        Assert.Equal((state.Dr0, state.Star, state.Lstar, state.Fmask, state.KernelGsBase, state.SysenterEip), (back.Dr0, back.Star, back.Lstar, back.Fmask, back.KernelGsBase, back.SysenterEip));
        Assert.Equal((state.MtrrDefType, state.MtrrFixed[2], state.MtrrVariable[0], state.NmiBlocked), (back.MtrrDefType, back.MtrrFixed[2], back.MtrrVariable[0], back.NmiBlocked));
        Assert.Equal(state.Xsave[20..52].ToArray(), back.Xsave[20..52].ToArray());
    }

    /// <summary>KVM takes it for a call of its own (Documentation/virt/kvm/x86/hypercalls.rst).</summary>
    private const string Hypercall = "long: #UD of VMCALL";

    /// <summary>
    /// Where KVM emulates kernels and runs ring 3 under page tables of its own, some cases end otherwise than on hardware. By what was seen when they ran there
    /// (KVASIR_KVM_ALL=1 runs them), and grouped by what it points at.
    /// </summary>
    private static readonly Dictionary<string, string> s_beyondEmulation = ((IEnumerable<(string Cause, string[] Cases)>)
    [
        (
            "its emulator has no far transfer between privilege levels, no gate and no INT n in protected mode, and answers with #UD",
            [
                "user: #GP of INT through a ring 0 gate",
                "32: call gate to ring 0 with parameters",
                "32: RETF n to ring 3 drops parameters on both stacks",
                "32: a ring 0 data segment becomes null in ring 3",
                "long: call gate to ring 0",
                "32: #GP of a call gate that is too inner",
                "32: #GP of IRET to an inner level",
                "v86: #GP of INT n below IOPL 3",
                "v86: IOPL 3 owns IF and may INT",
            ]),
        (
            "it delivers events by code of its own, which knows 32- and 64-bit gates only, does not check gates, and saves no RF and no data segments of virtual-8086 mode",
            [
                "long: #UD whose gate is absent gives #NP",
                "long: no stack: #PF, then #DF on its own stack",
                "32: a 16-bit interrupt gate",
                "real: an IDT without vectors: triple fault",
                "32: an exception through a task gate",
                "v86: entry, and #GP of HLT",
                "v86: the handler's frame holds the data segments",
                "user: POPFQ",
                "long: #GP of IRETQ to a non-canonical RIP",
            ]),
        (
            "ring 3 runs on the processor under the control registers of the host, whose TSD, FSGSBASE and VME are not the guest's",
            [
                "user: #GP of RDTSC with TSD",
                "user: #UD of RDFSBASE without FSGSBASE",
                "v86: VME",
                "v86: #UD of LLDT",
            ]),
        (
            "SYSCALL in ring 3 goes to LSTAR whether or not EFER.SCE is set",
            [
                "user: #UD of SYSCALL without EFER.SCE",
            ]),
        (
            "it runs no 32-bit code in ring 3 under a 64-bit kernel",
            [
                "long: SYSRETD to compatibility mode",
            ]),
        (
            "its emulator writes what it can before it faults, and reads ports ahead of the memory that they go to",
            [
                "ports: a page fault inside REP INSW is exact",
                "paging: a store across pages faults whole",
            ]),
        (
            "it refuses CR0.PG outside long mode with #GP, and its CPUID has no 1 GiB pages",
            [
                "paging: two levels, 4 MiB pages",
                "paging: PAE",
                "paging: 2 MiB and 1 GiB pages",
            ]),
        (
            "its CPUID has no PCIDs",
            [
                "paging: PCIDs and INVPCID",
            ]),
        (
            "it does not load the debug registers where it emulates, and steps by its own instructions",
            [
                "debug: MOV SS holds off the trap",
                "debug: single step through REP STOSB",
                "debug: write breakpoint",
                "debug: access breakpoint of 8 bytes",
                "debug: port breakpoint",
            ]),
        (
            "it looks for interrupts after a batch of emulated instructions, not after each",
            [
                "interrupts: STI's shadow",
                "interrupts: CR8 holds off and lets through",
                "interrupts: an NMI blocks the next until IRET",
            ]),
        (
            "it takes any value for the PAT",
            [
                "long: #GP of PAT type 2",
            ]),
    ]).SelectMany(group => group.Cases, (group, name) => (name, group.Cause)).ToDictionary(pair => pair.name, pair => pair.Cause, StringComparer.Ordinal);

    public static TheoryData<string> Names() => [.. s_cases.Keys];

    private static readonly Dictionary<string, SystemCase> s_cases =
        ((IEnumerable<SystemCase>)[.. ExceptionCases.All(), .. TransferCases.All(), .. ModeCases.All(), .. PagingCases.All(), .. DebugCases.All()])
        .ToDictionary(c => c.Name, StringComparer.Ordinal);

    [Theory]
    [MemberData(nameof(Names))]
    public void System_case(string name)
    {
        Rig.RequireKvm();
        if (name == Hypercall)
            Assert.Skip("KVM takes VMCALL for a call of its own");
        if (!Rig.Probe.IsHardware && s_beyondEmulation.TryGetValue(name, out string? cause) && Environment.GetEnvironmentVariable("KVASIR_KVM_ALL") is null)
            Assert.Skip($"this host's KVM emulates kernels (ring-0 code at {Rig.Probe.SpeedText} instructions/s): {cause}");
        SystemCase test = s_cases[name];
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(test.End, rig.Run());
        GuestTests.Check(rig, test);
    }

    /// <summary>
    /// A program under the PIT's interrupts through the 8259s and those of the local APIC's timer goes on where other controllers serve: periods, masks, vectors and
    /// what waits come along. At the end an I/O APIC pin is raised whose entry was written before the move.
    /// </summary>
    [Theory]
    [InlineData(KernelIrqChip.On, KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Split, KernelIrqChip.Off)]
    [InlineData(KernelIrqChip.Off, KernelIrqChip.On)]
    [InlineData(KernelIrqChip.Off, KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On, KernelIrqChip.Split)]
    [InlineData(KernelIrqChip.On, null)]
    [InlineData(KernelIrqChip.Split, null)]
    [InlineData(null, KernelIrqChip.On)]
    [InlineData(null, KernelIrqChip.Split)]
    public void Interrupt_controllers_cross(KernelIrqChip? first, KernelIrqChip? second)
    {
        Rig.RequireKvm();
        SystemCase test = IrqChipTests.TimersAndPin(ticks: 20);
        using VmClock clock = new(tscFrequency: Rig.Probe.TscFrequency);
        Rig from = Start(first, clock);
        try
        {
            from.Load(test);
            // Until both have interrupted twice.
            do
            {
                using System.Threading.Timer timer = new(static v => ((IVcpu)v!).Kick(), from.Vcpu, 10, System.Threading.Timeout.Infinite);
                Assert.Equal(VcpuExit.Kicked, from.Vcpu.Run());
                Assert.False(from.Exited, "the program ended before it could be moved");
            }
            while ((uint)from.Qword(SystemBuilder.Slot(20)) < 2 || (uint)from.Qword(SystemBuilder.Slot(21)) < 2);
            clock.Pause();
            using Rig to = Start(second, clock);
            Move(from, to);
            MoveControllers(from, to);
            from.Dispose();
            clock.Resume();
            Assert.Equal(SystemEnd.Exit, to.Run());
            Assert.InRange((uint)to.Qword(SystemBuilder.Slot(20)), 20u, uint.MaxValue);
            Assert.InRange((uint)to.Qword(SystemBuilder.Slot(21)), 20u, uint.MaxValue);
            Assert.InRange((uint)to.Qword(SystemBuilder.Slot(22)), 1u, uint.MaxValue);
        }
        finally
        {
            from.Dispose();
        }
    }

    private static Rig Start(KernelIrqChip? chip, VmClock clock) => chip is { } kind ? new Rig(irqChip: kind, clock: clock) : new Rig(kvm: false, clock: clock);

    private static void MoveControllers(Rig from, Rig to)
    {
        InterruptControllers? kernel = from.Processors.TakeControllers();
        LocalApic.State[] apics = [.. kernel?.LocalApics ?? [.. from.LocalApics.Select(apic => apic.Save())]];
        WiredControllers wired = kernel?.Wired ?? new WiredControllers(from.Pic.Save(), from.IoApic.Save(), from.Pit.Save());
        bool takesWires = to.Interrupts is { HasWires: true };
        if (to.Interrupts is not null)
            to.Processors.GiveControllers(new InterruptControllers(apics, takesWires ? wired : null));
        else
            to.LocalApics[0].Restore(apics[0]);
        if (takesWires)
            return;
        to.Pic.Restore(wired.Pic);
        to.IoApic.Restore(wired.IoApic);
        to.Pit.Restore(wired.Pit);
    }

    private static void Move(Rig from, Rig to)
    {
        from.Vcpu.GetState(out CpuState state);
        byte[] page = new byte[1 << 20];
        Assert.True(from.Memory.TryRead(new Gpa(0), page.AsSpan(0, 0xa_0000)));
        Assert.True(to.Memory.TryWrite(new Gpa(0), page.AsSpan(0, 0xa_0000)));
        to.Vcpu.SetState(in state);
    }
}
