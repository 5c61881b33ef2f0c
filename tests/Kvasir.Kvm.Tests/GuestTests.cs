using System;
using System.Collections.Generic;
using System.Linq;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>Guests on KVM that end as hardware would have them end.</summary>
[Collection(Rig.OneAtATime)]
public class GuestTests
{
    [Theory]
    [InlineData("real")]
    [InlineData("protected")]
    [InlineData("long")]
    [InlineData("ring 3")]
    public void Computes(string mode)
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Mix(mode, 2000);
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Executes_what_kvm_gives_up_on()
    {
        Rig.RequireKvm();
        List<string> lines = [];
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(rbx, 0x1111);
            a.mov(rcx, 0x2222);
            a.xor(eax, eax);
            a.xor(edx, edx);
            a.mov(edi, (uint)SystemBuilder.Scratch);
            a.@lock.cmpxchg16b(__xmmword_ptr[rdi]);
            a.mov(eax, 7);
            a.movd(xmm3, eax);
            a.fxsave(__[rdi + 0x100]);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b
            .Expect("the low half", SystemBuilder.Scratch, 8, 0x1111)
            .Expect("the high half", SystemBuilder.Scratch + 8, 8, 0x2222)
            .Expect("XMM3", SystemBuilder.Scratch + 0x100 + 160 + 48, 8, 7)
            .Build("rescue");
        using Rig rig = new(log: lines.Add);
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
        if (!Rig.Probe.IsHardware)
            Assert.True(rig.Rescued > 0, "this host's KVM used to give up on lock cmpxchg16b");
        Assert.Equal(rig.Rescued > 0, lines.Count > 0);
    }

    [Fact]
    public void Delivers_the_fault_of_a_rescued_instruction()
    {
        Rig.RequireKvm();
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(edi, 0x40_0000);
            a.@lock.cmpxchg16b(__xmmword_ptr[rdi]);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b
            .Expect("the vector", SystemBuilder.Slot(0), 8, 14)
            .Expect("the error code", SystemBuilder.Slot(1), 8, 2)
            .Expect("CR2", SystemBuilder.Slot(7), 8, 0x40_0000)
            .Build("fault of a rescued instruction");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Takes_interrupts_and_sleeps_in_hlt()
    {
        Rig.RequireKvm();
        SystemBuilder b = Programs.Long(a =>
        {
            a.sti();
            a.hlt();
            SystemBuilder.Exit(a);
        });
        SystemCase test = b.Expect("the vector", SystemBuilder.Slot(0), 8, 0x2d).Build("interrupt in HLT");
        using Rig rig = new();
        rig.Load(test);
        using Timer timer = new(_ => rig.Latch.WritePort(0x82, AccessSize.Byte, 0x2d), null, 50, Timeout.Infinite);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Holds_an_interrupt_until_the_guest_takes_it()
    {
        Rig.RequireKvm();
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(eax, 0x2d);
            a.@out(0x82, al);
            a.mov(eax, 0x77);
            a.mov(__dword_ptr[SystemBuilder.Slot(10)], eax);
            // A KVM that emulates kernels looks for interrupts now and then only.
            Label again = a.CreateLabel();
            a.mov(ecx, 100_000);
            a.sti();
            a.Label(ref again);
            a.dec(ecx);
            a.jne(again);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b
            .Expect("the vector", SystemBuilder.Slot(0), 8, 0x2d)
            .Expect("what came before it", SystemBuilder.Slot(10), 4, 0x77)
            .Build("interrupt window");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Four_processors_count_together()
    {
        Rig.RequireKvm();
        const int vcpus = 4;
        const int rounds = 400;
        SystemCase test = Programs.Long(a =>
        {
            Label again = a.CreateLabel();
            Label here = a.CreateLabel();
            a.mov(ecx, rounds);
            a.Label(ref again);
            a.@lock.inc(__qword_ptr[SystemBuilder.Scratch]);
            a.dec(ecx);
            a.jne(again);
            a.@out(0x81, al);
            a.Label(ref here);
            a.jmp(here);
        }).Build("counting");
        using Rig rig = new(vcpus: vcpus);
        rig.Load(test);
        foreach (IVcpu vcpu in rig.Vcpus)
            vcpu.SetState(test.Start);
        Thread[] threads = [.. rig.Vcpus.Select(vcpu => new Thread(() => vcpu.Run()))];
        foreach (Thread thread in threads)
            thread.Start();
        bool done = SpinWait.SpinUntil(() => rig.Latch.Writes >= vcpus, TimeSpan.FromSeconds(120));
        foreach (IVcpu vcpu in rig.Vcpus)
            vcpu.Kick();
        foreach (Thread thread in threads)
            Assert.True(thread.Join(TimeSpan.FromSeconds(120)), "a kick was lost");
        Assert.True(done, $"{rig.Latch.Writes} of {vcpus} processors finished");
        Assert.Equal((ulong)(vcpus * rounds), rig.Qword(SystemBuilder.Scratch));
    }

    [Fact]
    public void Repeats_string_io_and_reads_ports()
    {
        Rig.RequireKvm();
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(eax, 0x12345678);
            a.@out(0x80, eax);
            a.mov(edi, (uint)SystemBuilder.Scratch);
            a.mov(ecx, 5);
            a.mov(edx, 0x80);
            a.cld();
            a.rep.insd();
            a.@in(ax, 0x80);
            a.mov(__dword_ptr[SystemBuilder.Scratch + 64], eax);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b
            .Expect("the first", SystemBuilder.Scratch, 8, 0x1234567812345678)
            .Expect("the last, and nothing after it", SystemBuilder.Scratch + 16, 8, 0x12345678)
            .Expect("a word", SystemBuilder.Scratch + 64, 4, 0x12345678)
            .Build("string I/O");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    /// <summary>Five wait for the exit; of five hundred, KVM has room for some.</summary>
    [Theory]
    [InlineData(5, 2)]
    [InlineData(500, 10)]
    public void Keeps_writes_to_quiet_ports_for_later(int writes, int entries)
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Long(a =>
        {
            Label again = a.CreateLabel();
            a.mov(ecx, writes);
            a.Label(ref again);
            a.@out(0x80, al);
            a.inc(eax);
            a.dec(ecx);
            a.jne(again);
            SystemBuilder.Exit(a);
        }).Build("kept writes");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Assert.Equal(writes, rig.Latch.Writes);
        Assert.Equal((uint)(writes - 1) & 0xff, rig.Latch.ReadPort(0x80, AccessSize.Byte));
        ulong entered = ((KvmVcpu)rig.Vcpu).Entries;
        using KvmSystem system = new();
        if (system.Capability(KvmCapability.CoalescedPio) > 0)
            Assert.InRange(entered, 1ul, (ulong)entries);
    }

    [Fact]
    public void Logs_the_pages_that_the_guest_writes()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Long(a =>
        {
            a.mov(__dword_ptr[SystemBuilder.Scratch], eax);
            SystemBuilder.Exit(a);
        }).Build("dirty page");
        using KvmSystem system = new();
        using SpeedLoop parts = new();
        using KvmVm vm = new(system, parts.Memory);
        foreach (MemoryImage image in test.Memory)
            Assert.True(parts.Memory.TryWrite(new Gpa(image.Address), image.Bytes));
        using KvmVcpu vcpu = vm.CreateVcpu(0, new KvmVcpuWiring
        {
            Ports = parts.Ports, Mmio = parts.Mmio, Apic = parts.Apic, Clock = parts.Clock, Cpuid = system.SupportedCpuid, Signature = 0,
        });
        parts.Ports.Map(SystemCase.ExitPort, 1, new Kicker(vcpu));
        vcpu.SetState(test.Start);
        vm.SetDirtyLog(true);
        parts.Memory.ClearFlag(SystemBuilder.Scratch >> 12, PageFlags.Dirty);
        parts.Memory.ClearFlag(0x7_0000 >> 12, PageFlags.Dirty);
        Assert.Equal(VcpuExit.Kicked, vcpu.Run());
        vm.CollectDirtyPages();
        Assert.True(IsDirty(parts.Memory, SystemBuilder.Scratch));
        Assert.False(IsDirty(parts.Memory, 0x7_0000));
    }

    [Theory]
    [InlineData(300)]
    // More than a ring takes before it wants to be emptied.
    [InlineData(1400)]
    public void Notes_the_pages_that_the_guest_writes_in_a_ring(int pages)
    {
        Rig.RequireKvm();
        const uint entries = 1024;
        const ulong first = 0x10_0000;
        SystemBuilder b = SystemBuilder.Protected();
        b.Assemble(SystemBuilder.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(edi, (uint)first);
            a.mov(ecx, pages);
            a.Label(ref again);
            a.mov(__dword_ptr[edi], ecx);
            a.add(edi, 4096);
            a.dec(ecx);
            a.jne(again);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b.Build("written pages");
        using KvmSystem system = new();
        using SpeedLoop parts = new();
        using GuestMemory memory = new(16ul << 20, "kvm-test");
        using KvmVm vm = new(system, memory, entries);
        if (vm.DirtyRingEntries == 0)
            Assert.Skip("this host's KVM has no dirty rings");
        foreach (MemoryImage image in test.Memory)
            Assert.True(memory.TryWrite(new Gpa(image.Address), image.Bytes));
        using KvmVcpu vcpu = vm.CreateVcpu(0, new KvmVcpuWiring
        {
            Ports = parts.Ports, Mmio = parts.Mmio, Apic = parts.Apic, Clock = parts.Clock, Cpuid = system.SupportedCpuid, Signature = 0,
        });
        parts.Ports.Map(SystemCase.ExitPort, 1, new Kicker(vcpu));
        vm.SetDirtyLog(true);
        for (int round = 0; round < 2; round++)
        {
            for (ulong page = 0; page < 16ul << 20 >> 12; page++)
                memory.ClearFlag(page, PageFlags.Dirty);
            vcpu.SetState(test.Start);
            Assert.Equal(VcpuExit.Kicked, vcpu.Run());
            vm.CollectDirtyPages();
            for (ulong page = first >> 12; page < (first >> 12) + (ulong)pages; page++)
                Assert.True(IsDirty(memory, page << 12), $"round {round}: the page at {page << 12:x}h was written");
            // A KVM that emulates kernels may write over its ring: then everything counts as written.
            Assert.True(!vm.DirtyRingOverflowed || !Rig.Probe.IsHardware);
            Assert.Equal(vm.DirtyRingOverflowed, IsDirty(memory, first + (ulong)pages * 4096));
            Assert.Equal(vm.DirtyRingOverflowed, IsDirty(memory, 0x7_0000));
        }
        vm.SetDirtyLog(false);
        vcpu.SetState(test.Start);
        Assert.Equal(VcpuExit.Kicked, vcpu.Run());
        Assert.Throws<InvalidOperationException>(vm.CollectDirtyPages);
    }

    [Fact]
    public void Stops_at_a_breakpoint()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Long(a =>
        {
            a.nop();
            a.nop();
            a.inc(eax);
            SystemBuilder.Exit(a);
        }).Build("breakpoint");
        using Rig rig = new();
        rig.Load(test);
        KvmVcpu vcpu = (KvmVcpu)rig.Vcpu;
        vcpu.SetGuestDebug(false, SystemBuilder.Program + 2);
        Assert.Equal(VcpuExit.Debug, vcpu.Run());
        vcpu.GetState(out CpuState state);
        Assert.Equal(SystemBuilder.Program + 2, state.Rip);
        vcpu.SetGuestDebug(singleStep: true);
        Assert.Equal(VcpuExit.Debug, vcpu.Run());
        vcpu.GetState(out state);
        Assert.Equal(SystemBuilder.Program + 4, state.Rip);
        Assert.Equal(1ul, state.Gpr[0]);
        vcpu.SetGuestDebug(singleStep: false);
        Assert.Equal(SystemEnd.Exit, rig.Run());
    }

    /// <summary>As a kernel starts its first process: it writes the entry's address, goes to ring 3 by IRETQ, and the process makes a system call.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_kernel_that_goes_to_ring_3_by_itself_is_called_back(bool giveUpFirst)
    {
        Rig.RequireKvm();
        const ulong entry = 0x9000;
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(ecx, 0xc000_0081);
            a.xor(eax, eax);
            a.mov(edx, (uint)SystemBuilder.Code64 | (uint)(SystemBuilder.UserData - 8) << 16);
            a.wrmsr();
            a.mov(ecx, 0xc000_0082);
            a.mov(eax, (uint)entry);
            a.xor(edx, edx);
            a.wrmsr();
            if (giveUpFirst)
                a.swapgs();
            a.push(SystemBuilder.UserData);
            a.push((int)SystemBuilder.UserStack);
            a.push(2);
            a.push(SystemBuilder.UserCode64);
            a.push((int)SystemBuilder.UserCode);
            a.iretq();
        });
        b.Assemble(entry, a =>
        {
            a.mov(eax, cs);
            a.mov(__dword_ptr[SystemBuilder.Slot(20)], eax);
            a.mov(__[SystemBuilder.Slot(21)], rcx);
            SystemBuilder.Exit(a);
        });
        b.Assemble(SystemBuilder.UserCode, a => a.syscall());
        SystemCase test = b
            .Expect("CS", SystemBuilder.Slot(20), 4, SystemBuilder.Code64)
            .Expect("RCX", SystemBuilder.Slot(21), 8, SystemBuilder.UserCode + 2)
            .Build("first system call");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void An_entry_of_system_calls_that_is_no_address_raises_GP()
    {
        Rig.RequireKvm();
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(ecx, 0xc000_0082);
            a.xor(eax, eax);
            a.mov(edx, 0x8000_0000);
            a.wrmsr();
            SystemBuilder.Exit(a);
        });
        SystemCase test = b.Expect("the vector", SystemBuilder.Slot(0), 8, 13).Expect("the error code", SystemBuilder.Slot(1), 8, 0).Build("LSTAR");
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Drops_writes_to_rom()
    {
        Rig.RequireKvm();
        const ulong rom = 0x20_0000 - 0x1000;
        SystemBuilder b = Programs.Long(a =>
        {
            a.mov(__dword_ptr[rom], ecx);
            a.mov(eax, __dword_ptr[rom]);
            a.mov(__dword_ptr[SystemBuilder.Scratch], eax);
            SystemBuilder.Exit(a);
        });
        b.State.Gpr[1] = 5;
        SystemCase test = b.Expect("what was read", SystemBuilder.Scratch, 4, 0x44332211).Build("ROM");
        using Rig rig = new();
        rig.Memory.AddRom(new Gpa(rom), [0x11, 0x22, 0x33, 0x44]);
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
        Check(rig, test);
    }

    [Fact]
    public void Allocates_nothing_for_an_exit()
    {
        Rig.RequireKvm();
        using Rig rig = new();
        // What a run costs once is not an exit's doing: ten times the exits must cost no more.
        long few = LeastAllocated(rig, 200);
        long many = LeastAllocated(rig, 2000);
        Assert.Equal(3 * 2200, rig.Latch.Writes);
        Assert.Equal(few, many);
    }

    private static long LeastAllocated(Rig rig, int exits)
    {
        SystemBuilder b = SystemBuilder.Real();
        b.Assemble(SystemBuilder.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(cx, (short)exits);
            a.Label(ref again);
            a.@out(0x81, al);
            a.dec(cx);
            a.jne(again);
            SystemBuilder.Exit(a);
        });
        SystemCase test = b.Build("port writes");
        long least = long.MaxValue;
        for (int i = 0; i < 3; i++)
        {
            rig.Load(test);
            long before = GC.GetAllocatedBytesForCurrentThread();
            Assert.Equal(VcpuExit.Kicked, rig.Vcpu.Run());
            least = Math.Min(least, GC.GetAllocatedBytesForCurrentThread() - before);
        }
        return least;
    }

    internal static void Check(Rig rig, SystemCase test)
    {
        List<string> wrong = [];
        foreach (MemoryExpectation expected in test.Expected)
        {
            byte[] bytes = new byte[8];
            Assert.True(rig.Memory.TryRead(new Gpa(expected.Address), bytes.AsSpan(0, expected.Size)));
            ulong value = BitConverter.ToUInt64(bytes);
            if (value != expected.Value)
                wrong.Add($"{expected.What} is {value:x}h, not {expected.Value:x}h");
        }
        Assert.True(wrong.Count == 0, $"{test.Name}: {string.Join("; ", wrong)}");
    }

    private static unsafe bool IsDirty(GuestMemory memory, ulong address) => (memory.Flags[address >> 12] & (byte)PageFlags.Dirty) != 0;

    private sealed class Kicker(IVcpu vcpu) : IPortDevice
    {
        public uint ReadPort(ushort port, AccessSize size) => 0xff;

        public void WritePort(ushort port, AccessSize size, uint value) => vcpu.Kick();
    }
}
