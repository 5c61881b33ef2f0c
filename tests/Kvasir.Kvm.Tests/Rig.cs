using System;
using System.Threading;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Cpu.Tests.Privileged;
using Kvasir.Devices.Chipset;
using Kvasir.Machine;
using Xunit;

namespace Kvasir.Kvm.Tests;

/// <summary>A VM of processors, memory, an exit port and real local APICs, on KVM or on the software CPU.</summary>
internal sealed class Rig : IPortDevice, IDisposable
{
    /// <summary>All tests share it, so that none runs beside another: descriptors and mappings are counted.</summary>
    public const string OneAtATime = "one at a time";

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(120);
    private static readonly KvmProbe s_probe = KvmProbe.Run();

    private readonly bool _ownsClock;
    private readonly IProcessorFactory _processors;
    private readonly ApicBus _apics = new();

    public Rig(bool kvm = true, int vcpus = 1, IKvmCalls? calls = null, Action<string>? log = null, ulong memory = 16ul << 20, KernelIrqChip irqChip = KernelIrqChip.Off, VmClock? clock = null)
    {
        _ownsClock = clock is null;
        Clock = clock ?? new VmClock(tscFrequency: s_probe.Problem is null ? s_probe.TscFrequency : VmClock.DefaultTscFrequency);
        Memory = new GuestMemory(memory, "kvm-test");
        Vcpus = new IVcpu[vcpus];
        Ports.Map(SystemCase.ExitPort, 1, this);
        Latch = new LatchDevice(this);
        Ports.Map(0x80, 6, Latch, AccessSize.Dword);
        try
        {
            CpuModel model = CpuModel.Parse("host", vcpus, Clock.TscFrequency);
            _processors = kvm ? new KvmProcessors(new KvmSystem(calls), model, Memory, Ports, Mmio, Clock, log, s_probe.Ring3NeedsMending, irqChip) : new SoftwareProcessors(model, Memory, Ports, Mmio, Clock, ExecutionEngine.Interpreter, new AcceleratorLogs());
        }
        catch
        {
            DisposeClock();
            Memory.Dispose();
            throw;
        }
        Pic = new Pic8259(_apics.Lint0);
        Pic.Map(Ports);
        _apics.ConnectExternal(Pic);
        IoApic = new IoApic(_apics);
        Mmio.Map(new Gpa(0xfec0_0000), IoApic.RegionSize, IoApic, AccessSize.Dword, AccessSize.Dword);
        Pit = new Pit8254(Clock, new IsaIrqs(Pic, IoApic).Line(0));
        Pit.Map(Ports);
        LocalApics = new LocalApic[vcpus];
        if (_processors.Interrupts is { } kernel)
        {
            _apics.Connect(kernel);
            if (kernel.HasWires)
                Pic.Connect(kernel);
        }
        try
        {
            for (int i = 0; i < vcpus; i++)
            {
                LocalApic apic = LocalApics[i] = new((uint)i, i == 0, _apics, Clock);
                Vcpus[i] = _processors.Create(i, apic);
                apic.Connect(Vcpus[i]);
                apic.TryWriteMsr(0x1b, apic.Base | 1 << 11);
                apic.Registers.Write(0xf0, AccessSize.Dword, 0x1ff);
            }
            _processors.Reset();
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public static KvmProbe Probe => s_probe;

    public VmClock Clock { get; }

    public GuestMemory Memory { get; }

    public PortBus Ports { get; } = new();

    public MmioBus Mmio { get; } = new();

    public IVcpu[] Vcpus { get; }

    public IVcpu Vcpu => Vcpus[0];

    public LatchDevice Latch { get; }

    public Pic8259 Pic { get; }

    public IoApic IoApic { get; }

    public Pit8254 Pit { get; }

    public LocalApic[] LocalApics { get; }

    public IProcessorFactory Processors => _processors;

    public IDoorbellTaker? Doorbells => _processors.Doorbells;

    public KvmInterrupts? Interrupts => (KvmInterrupts?)_processors.Interrupts;

    public bool Exited { get; set; }

    public long Rescued => ((KvmProcessors)_processors).Rescues.Count;

    /// <summary>Skips the test where KVM cannot be used, saying why.</summary>
    public static void RequireKvm()
    {
        if (s_probe.Problem is { } problem)
            Assert.Skip($"{problem}{(s_probe.Fix is null ? "" : $"; {s_probe.Fix}")}");
    }

    public void Load(SystemCase test)
    {
        foreach (MemoryImage image in test.Memory)
            Assert.True(Memory.TryWrite(new Gpa(image.Address), image.Bytes));
        CpuState start = test.Start;
        Vcpu.SetState(in start);
    }

    /// <summary>Runs until the guest writes to the exit port, shuts down, or takes too long (null).</summary>
    public SystemEnd? Run()
    {
        Exited = false;
        using Timer watchdog = new(static v => ((IVcpu)v!).Kick(), Vcpu, s_patience, Timeout.InfiniteTimeSpan);
        VcpuExit exit = Vcpu.Run();
        Assert.True(exit != VcpuExit.Failure, Vcpu.FailureReport);
        return exit == VcpuExit.TripleFault ? SystemEnd.TripleFault : Exited ? SystemEnd.Exit : null;
    }

    public ulong Qword(ulong address) => Memory.TryRead(new Gpa(address), out ulong value) ? value : throw new ArgumentOutOfRangeException(nameof(address));

    public uint ReadPort(ushort port, AccessSize size) => 0xff;

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        Exited = true;
        foreach (IVcpu vcpu in Vcpus)
            vcpu.Kick();
    }

    public void Dispose()
    {
        DisposeClock();
        foreach (IVcpu vcpu in Vcpus)
            vcpu?.Dispose();
        _processors.Dispose();
        Memory.Dispose();
    }

    private void DisposeClock()
    {
        if (_ownsClock)
            Clock.Dispose();
    }

    /// <summary>
    /// 80h: keeps what is written. 82h (byte): requests the interrupt vector that is written. 83h: requests an NMI. 84h: the level of I/O APIC pin 16. 85h: that of
    /// 8259 input 3.
    /// </summary>
    internal sealed class LatchDevice(Rig owner) : IPortDevice
    {
        private uint _value;
        private int _writes;

        public int Writes => Volatile.Read(ref _writes);

        public uint ReadPort(ushort port, AccessSize size) => _value >> (port - 0x80) * 8;

        public void WritePort(ushort port, AccessSize size, uint value)
        {
            Interlocked.Increment(ref _writes);
            switch (port)
            {
                case 0x82:
                    owner._apics.Send(0xfee0_0000, value);
                    break;
                case 0x83:
                    owner.Vcpu.Nmi();
                    break;
                case 0x84:
                    owner.IoApic.Pin(16).Set(value != 0);
                    break;
                case 0x85:
                    owner.Pic.Input(3).Set(value != 0);
                    break;
                default:
                    _value = value;
                    break;
            }
        }
    }
}
