using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Interpreter;

/// <summary>
/// vCPUs in ring 0 of long mode on shared memory: the first 16 MiB are mapped one to one by 4 KiB pages with every right. Programs end by writing to port F4h.
/// </summary>
internal sealed class LongModeMachine : IDisposable
{
    public const ulong Program = 0x10_0000;
    public const ulong Data = 0x20_0000;
    private const ulong Tables = 0x1_0000;
    private const ulong Idt = 0x9000;
    private const ulong Gdt = 0x8000;
    private const int TableEntries = 512;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);

    private readonly List<SoftVcpu> _vcpus = [];
    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly CodeCache _code;

    public LongModeMachine(int cpus = 1, ulong codeCapacity = 16ul << 20, bool translate = false, bool lockStep = false)
    {
        Memory = new GuestMemory(32ul << 20, "long-mode-machine");
        _code = new CodeCache(Memory, new ExecutionBarrier(), codeCapacity, translate || lockStep ? codeCapacity : 0, threshold: 2, lockStep);
        Memory.TryWrite(new Gpa(Tables), (Tables + 0x1000) | 7ul);
        Memory.TryWrite(new Gpa(Tables + 0x1000), (Tables + 0x2000) | 7ul);
        for (ulong i = 0; i < 8; i++)
            Memory.TryWrite(new Gpa(Tables + 0x2000 + i * 8), (Tables + 0x3000 + i * 0x1000) | 7ul);
        for (ulong page = 0; page < 8 * TableEntries; page++)
            Memory.TryWrite(new Gpa(PageEntry(page << 12)), page << 12 | 7ul);
        Memory.TryWrite(new Gpa(Gdt + 8), 0x00af_9b00_0000_fffful);
        Memory.TryWrite(new Gpa(Gdt + 16), 0x00cf_9300_0000_fffful);
        for (int i = 0; i < cpus; i++)
        {
            PortBus ports = new();
            SoftVcpu vcpu = new(i, CpuModel.Parse("host"), Memory, ports, new MmioBus(), new NoApic(), _clock, _code);
            ports.Map(0xf4, 1, new ExitPort(vcpu));
            _vcpus.Add(vcpu);
        }
    }

    public GuestMemory Memory { get; }

    public CodeCache Code => _code;

    public IReadOnlyList<SoftVcpu> Vcpus => _vcpus;

    /// <summary>Where the page table entry of a linear address lies.</summary>
    public static ulong PageEntry(ulong linear) => Tables + 0x3000 + (linear >> 12) * 8;

    /// <summary>Assembles a program at an address; <paramref name="build"/> need not end it: leaving through the exit port is added.</summary>
    public void Assemble(ulong address, Action<Assembler> build, bool exit = true)
    {
        Assembler a = new(64);
        build(a);
        if (exit)
            a.@out(0xf4, al);
        using MemoryStream stream = new();
        a.Assemble(new StreamCodeWriter(stream), address);
        Assert.True(Memory.TryWrite(new Gpa(address), stream.ToArray()));
    }

    /// <summary>Sets an interrupt gate.</summary>
    public void Gate(int vector, ulong handler)
    {
        Memory.TryWrite(new Gpa(Idt + (ulong)vector * 16), (handler & 0xffff) | 8ul << 16 | 0x8eul << 40 | (handler >> 16 & 0xffff) << 48);
        Memory.TryWrite(new Gpa(Idt + (ulong)vector * 16 + 8), handler >> 32);
    }

    /// <summary>Puts a vCPU at an address, with a stack of its own.</summary>
    public void Place(int vcpu, ulong rip)
    {
        CpuState s = CpuState.AtReset();
        s.Cr0 = 0x8001_0033;
        s.Cr3 = Tables;
        s.Cr4 = 0x620;
        s.Efer = 0x500;
        s.Cs = new SegmentState(8, 0, 0xffff_ffff, 0xa09b);
        s.Ss = s.Ds = s.Es = s.Fs = s.Gs = new SegmentState(16, 0, 0xffff_ffff, 0xc093);
        s.Gdtr = new TableState(Gdt, 0x17);
        s.Idtr = new TableState(Idt, 0xfff);
        s.Rip = rip;
        s.Gpr[4] = 0xf0_0000 - (ulong)vcpu * 0x1_0000;
        s.Gpr[7] = (ulong)vcpu;
        _vcpus[vcpu].SetState(in s);
    }

    /// <summary>Decodes and translates the block at an address, without running it.</summary>
    public unsafe void Translate(ulong address)
    {
        Place(0, address);
        SoftVcpu vcpu = _vcpus[0];
        vcpu.Barrier.Enter();
        try
        {
            Op* first = BlockLookup.Find(vcpu.Block);
            Assert.True(first != null);
            Assert.True(_code.Translator!.Translate(vcpu, Translator.BlockOf(first), vcpu.Block->Mode));
        }
        finally
        {
            vcpu.Barrier.Leave();
        }
    }

    /// <summary>Runs every vCPU from an address to the exit port, each on a thread.</summary>
    public void Run(params ulong[] starts)
    {
        Thread[] threads = new Thread[starts.Length];
        VcpuExit[] exits = new VcpuExit[starts.Length];
        bool timedOut = false;
        using Timer watchdog = new(
            _ =>
            {
                timedOut = true;
                foreach (SoftVcpu vcpu in _vcpus)
                    vcpu.Kick();
            },
            null,
            Patience,
            Timeout.InfiniteTimeSpan);
        for (int i = 0; i < starts.Length; i++)
        {
            int index = i;
            Place(index, starts[index]);
            threads[i] = new Thread(() => exits[index] = _vcpus[index].Run());
        }
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            thread.Join();
        Assert.False(timedOut, $"the guest did not end: {FailureReports.Describe(_vcpus[0], "time limit")}");
        for (int i = 0; i < starts.Length; i++)
            Assert.True(exits[i] == VcpuExit.Kicked, $"vCPU {i}: {exits[i]} {_vcpus[i].FailureReport}");
    }

    public unsafe void Write(ulong address, ulong value) => Memory.TryWrite(new Gpa(address), new ReadOnlySpan<byte>(&value, sizeof(ulong)));

    public ulong Read(ulong address)
    {
        Assert.True(Memory.TryRead(new Gpa(address), out ulong value));
        return value;
    }

    public void Dispose()
    {
        foreach (SoftVcpu vcpu in _vcpus)
            vcpu.Dispose();
        _code.Dispose();
        _clock.Dispose();
        Memory.Dispose();
    }

    private sealed class ExitPort(SoftVcpu vcpu) : IPortDevice
    {
        public uint ReadPort(ushort port, AccessSize size) => 0;

        public void WritePort(ushort port, AccessSize size, uint value) => vcpu.Kick();
    }

    private sealed class NoApic : ILocalApic, IMmioDevice
    {
        public bool HasInterrupt => false;

        public byte TaskPriorityClass { get; set; }

        public long TscOffset { get; set; }

        public ulong Base => 0xfee0_0900;

        public IMmioDevice Registers => this;

        public int Acknowledge() => -1;

        public bool TryReadMsr(uint msr, out ulong value)
        {
            value = 0;
            return false;
        }

        public bool TryWriteMsr(uint msr, ulong value) => false;

        public void Init()
        {
        }

        public ulong Read(ulong offset, AccessSize size) => 0;

        public void Write(ulong offset, AccessSize size, ulong value)
        {
        }
    }
}
