using System;
using System.Threading;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>How a case is executed.</summary>
public enum Execution
{
    /// <summary>One instruction at a time.</summary>
    Stepped,

    /// <summary>In blocks.</summary>
    Interpreted,

    /// <summary>In blocks that are translated before they run.</summary>
    Translated,
}

/// <summary>Runs system cases on the software CPU and checks their end.</summary>
internal static class SystemRunner
{
    private const int StepLimit = 20_000;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(10);

    /// <param name="test">The case.</param>
    /// <param name="execution">How it is executed.</param>
    public static void Check(SystemCase test, Execution execution)
    {
        using GuestMemory memory = new(4ul << 20, "system-case");
        using VmClock clock = VmClock.CreateManual();
        using CodeCache code = new(memory, new ExecutionBarrier(), 4ul << 20, execution == Execution.Translated ? 4ul << 20 : 0, threshold: 1);
        PortBus ports = new();
        ExitDevice exit = new();
        ports.Map(SystemCase.ExitPort, 1, exit);
        ports.Map(0x80, 4, exit.Latch, AccessSize.Dword);
        ScriptedApic apic = new();
        using SoftVcpu vcpu = new(0, CpuModel.Parse("host"), memory, ports, new MmioBus(), apic, clock, code);
        exit.Vcpu = vcpu;
        exit.Apic = apic;
        foreach (MemoryImage image in test.Memory)
            Assert.True(memory.TryWrite(new Gpa(image.Address), image.Bytes));
        CpuState start = test.Start;
        vcpu.SetState(in start);
        SystemEnd? end = execution == Execution.Stepped ? Step(vcpu, exit) : Run(vcpu, exit);
        if (end != test.End)
            Assert.Fail($"{test.Name}: ended with {end?.ToString() ?? "nothing"} instead of {test.End}\n{Dump(memory)}{FailureReports.Describe(vcpu, "end of the case")}");
        foreach (MemoryExpectation expected in test.Expected)
        {
            byte[] bytes = new byte[8];
            Assert.True(memory.TryRead(new Gpa(expected.Address), bytes.AsSpan(0, expected.Size)));
            ulong value = BitConverter.ToUInt64(bytes);
            if (value != expected.Value)
                Assert.Fail($"{test.Name}: {expected.What} is {value:x}h, not {expected.Value:x}h\n{Dump(memory)}{FailureReports.Describe(vcpu, "end of the case")}");
        }
    }

    /// <summary>A machine that can run its case several times.</summary>
    public sealed class Bench : IDisposable
    {
        private readonly SystemCase _test;
        private readonly GuestMemory _memory = new(4ul << 20, "system-bench");
        private readonly VmClock _clock = VmClock.CreateManual();
        private readonly CodeCache _code;
        private readonly ExitDevice _exit = new();
        private readonly SoftVcpu _vcpu;

        public Bench(SystemCase test)
        {
            _test = test;
            _code = new CodeCache(_memory, new ExecutionBarrier(), 4ul << 20);
            PortBus ports = new();
            ports.Map(SystemCase.ExitPort, 1, _exit);
            ports.Map(0x80, 4, _exit.Latch, AccessSize.Dword);
            ScriptedApic apic = new();
            _vcpu = new SoftVcpu(0, CpuModel.Parse("host"), _memory, ports, new MmioBus(), apic, _clock, _code);
            _exit.Vcpu = _vcpu;
            _exit.Apic = apic;
            foreach (MemoryImage image in test.Memory)
                Assert.True(_memory.TryWrite(new Gpa(image.Address), image.Bytes));
        }

        /// <returns>Whether the case came to its exit.</returns>
        public bool Run()
        {
            CpuState start = _test.Start;
            _vcpu.SetState(in start);
            return SystemRunner.Run(_vcpu, _exit) == SystemEnd.Exit;
        }

        /// <summary>One instruction at a time, up to a number of them.</summary>
        public void Step(int limit)
        {
            CpuState start = _test.Start;
            _vcpu.SetState(in start);
            for (int i = 0; i < limit && !_exit.Written; i++)
            {
                if (_vcpu.Step() is not null)
                    return;
            }
        }

        public string Describe() => FailureReports.Describe(_vcpu, "where it stands");

        public void Dispose()
        {
            _vcpu.Dispose();
            _code.Dispose();
            _clock.Dispose();
            _memory.Dispose();
        }
    }

    private static string Dump(GuestMemory memory)
    {
        string text = "results:";
        for (ulong i = 0; i < 12; i++)
            text += memory.TryRead(new Gpa(SystemBuilder.Results + i * 8), out ulong value) ? $" {value:x}" : " ?";
        return text + "\n";
    }

    private static SystemEnd? Step(SoftVcpu vcpu, ExitDevice exit)
    {
        for (int i = 0; i < StepLimit; i++)
        {
            VcpuExit? outcome = vcpu.Step();
            if (outcome == VcpuExit.TripleFault)
                return SystemEnd.TripleFault;
            if (exit.Written)
                return SystemEnd.Exit;
        }
        return null;
    }

    private static SystemEnd? Run(SoftVcpu vcpu, ExitDevice exit)
    {
        using Timer watchdog = new(static v => ((SoftVcpu)v!).Kick(), vcpu, Patience, Timeout.InfiniteTimeSpan);
        return vcpu.Run() switch
        {
            VcpuExit.TripleFault => SystemEnd.TripleFault,
            _ => exit.Written ? SystemEnd.Exit : null,
        };
    }

    /// <summary>Ends the case when it is written to. Its latch, at port 80h, keeps a value, and asks for an interrupt when its byte 1 is written.</summary>
    private sealed class ExitDevice : IPortDevice
    {
        public ExitDevice() => Latch = new LatchDevice(this);

        public bool Written { get; private set; }

        public SoftVcpu? Vcpu { get; set; }

        public ScriptedApic? Apic { get; set; }

        public LatchDevice Latch { get; }

        public uint ReadPort(ushort port, AccessSize size) => 0xff;

        public void WritePort(ushort port, AccessSize size, uint value)
        {
            Written = true;
            Vcpu!.Kick();
        }
    }

    /// <summary>80h: keeps what is written, up to 32 bits. 82h (byte): requests the interrupt vector that is written. 83h: requests an NMI.</summary>
    private sealed class LatchDevice(ExitDevice owner) : IPortDevice
    {
        private uint _value;

        public uint ReadPort(ushort port, AccessSize size) => _value >> (port - 0x80) * 8;

        public void WritePort(ushort port, AccessSize size, uint value)
        {
            switch (port)
            {
                case 0x82:
                    owner.Apic!.Request((int)value);
                    owner.Vcpu!.InterruptChanged();
                    break;
                case 0x83:
                    owner.Vcpu!.Nmi();
                    break;
                default:
                    _value = value;
                    break;
            }
        }
    }

    /// <summary>A local APIC with one pending vector at most.</summary>
    private sealed class ScriptedApic : ILocalApic, IMmioDevice
    {
        private int _pending = -1;

        public bool HasInterrupt => _pending >= 0 && _pending >> 4 > TaskPriorityClass;

        public byte TaskPriorityClass { get; set; }

        public long TscOffset { get; set; }

        public ulong Base => 0xfee0_0900;

        public IMmioDevice Registers => this;

        public void Request(int vector) => _pending = vector;

        public int Acknowledge()
        {
            int vector = _pending;
            _pending = -1;
            return vector;
        }

        public bool TryReadMsr(uint msr, out ulong value)
        {
            value = Base;
            return msr == 0x1b;
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
