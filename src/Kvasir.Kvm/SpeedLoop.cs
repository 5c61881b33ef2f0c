using System;
using System.Diagnostics;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>
/// A tiny guest in 64-bit mode at privilege level 0 that counts down and then writes to a port: how fast an accelerator runs kernels. It runs on any of them.
/// </summary>
public sealed class SpeedLoop : IPortDevice, IDisposable
{
    private const ushort EndPort = 0x80;
    private const ulong Tables = 0x1000;
    private const ulong Code = 0x4000;
    private const ulong Stack = 0x8000;
    private const int InstructionsPerRound = 2;
    private const int FewRounds = 16;
    private const int FirstRounds = 2_000;
    private const double Goal = 1e-3;
    private const long MostRounds = 4_000_000;

    // dec rcx; jnz -5; out 80h, al; jmp -2
    private static readonly byte[] s_code = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0x80, 0xeb, 0xfe];

    // Wiring
    private IVcpu? _vcpu;

    public SpeedLoop()
    {
        Memory = new GuestMemory(1ul << 20, "speed-loop");
        Ports.Map(EndPort, 1, this);
        const ulong table = (ulong)(PageEntry.Present | PageEntry.Writable);
        Memory.TryWrite(new Gpa(Tables), Tables + 0x1000 | table);
        Memory.TryWrite(new Gpa(Tables + 0x1000), Tables + 0x2000 | table);
        Memory.TryWrite(new Gpa(Tables + 0x2000), table | (ulong)PageEntry.Large);
        Memory.TryWrite(new Gpa(Code), s_code);
    }

    public GuestMemory Memory { get; }

    public PortBus Ports { get; } = new();

    public MmioBus Mmio { get; } = new();

    public VmClock Clock { get; } = VmClock.CreateManual();

    /// <summary>An APIC that has nothing to say.</summary>
    public ILocalApic Apic { get; } = new SilentApic();

    /// <summary>Runs the loop on a vCPU that is connected to the parts above.</summary>
    /// <returns>Instructions a second; 0 where the vCPU could not run it, and then its report says why.</returns>
    public double Measure(IVcpu vcpu)
    {
        ArgumentNullException.ThrowIfNull(vcpu);
        _vcpu = vcpu;
        long rounds = FirstRounds;
        // The first run pays for what is made on first use, the second for the way in and out, which takes a millisecond where KVM itself runs in an emulator.
        if (!TryRun(vcpu, FewRounds, out _) || !TryRun(vcpu, FewRounds, out double way))
            return 0;
        while (true)
        {
            if (!TryRun(vcpu, rounds, out double seconds))
                return 0;
            if (seconds - way >= Goal || rounds >= MostRounds)
                return rounds * InstructionsPerRound / Math.Max(seconds - way, seconds / 2);
            rounds = Math.Min(MostRounds, rounds * 16);
        }
    }

    public uint ReadPort(ushort port, AccessSize size) => 0xff;

    public void WritePort(ushort port, AccessSize size, uint value) => _vcpu?.Kick();

    public void Dispose()
    {
        Clock.Dispose();
        Memory.Dispose();
    }

    private static bool TryRun(IVcpu vcpu, long rounds, out double seconds)
    {
        CpuState state = CpuState.AtReset();
        state.Gpr[1] = (ulong)rounds;
        state.Gpr[4] = Stack;
        state.Rip = Code;
        state.Cs = new SegmentState(0x10, 0, uint.MaxValue, 0xa09b);
        state.Ds = state.Es = state.Ss = state.Fs = state.Gs = new SegmentState(0x18, 0, uint.MaxValue, 0xc093);
        state.Cr0 = (ulong)(Cr0.PE | Cr0.ET | Cr0.NE | Cr0.PG);
        state.Cr3 = Tables;
        state.Cr4 = (ulong)Cr4.PAE;
        state.Efer = (ulong)(Efer.LME | Efer.LMA);
        vcpu.SetState(in state);
        long begun = Stopwatch.GetTimestamp();
        VcpuExit exit = vcpu.Run();
        seconds = Math.Max(Stopwatch.GetElapsedTime(begun).TotalSeconds, 1e-9);
        return exit == VcpuExit.Kicked;
    }

    private sealed class SilentApic : ILocalApic, IMmioDevice
    {
        public bool HasInterrupt => false;

        public byte TaskPriorityClass { get; set; }

        public ulong Base => 0xfee0_0900;

        public long TscOffset { get; set; }

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
