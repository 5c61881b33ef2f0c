using System;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu.Tests.Vector;

/// <summary>A vCPU in flat 32-bit protected mode at ring 0 without paging, for single instructions under chosen control registers.</summary>
internal sealed unsafe class VectorMachine : IDisposable
{
    public const uint Code = 0x10_0000;
    public const uint Data = 0x11_0000;

    /// <summary>A device's page: every byte reads as the low byte of its offset; what is written is kept.</summary>
    public const ulong Device = 0xf000_0000;
    private const uint FlatCode = 0xc09b;
    private const uint FlatData = 0xc093;

    private readonly GuestMemory _memory = new(4ul << 20, "vector-tests");
    private readonly CodeCache _code;

    public VectorMachine(ulong clearCr0 = 0, ulong setCr0 = 0, ulong clearCr4 = 0, ulong xcr0 = 7)
    {
        _code = new CodeCache(_memory, new ExecutionBarrier(), 16ul << 20);
        MmioBus mmio = new();
        mmio.Map(new Gpa(Device), 4096, Registers);
        Vcpu = new SoftVcpu(0, new CpuModel(), _memory, new PortBus(), mmio, new NoApic(), VmClock.CreateManual(), _code);
        CpuState state = CpuState.AtReset();
        state.Rip = Code;
        state.Cr0 = ((ulong)(Cr0.PE | Cr0.ET | Cr0.NE | Cr0.MP) | setCr0) & ~clearCr0;
        state.Cr4 = (ulong)(Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.OSXSAVE) & ~clearCr4;
        state.Xcr0 = xcr0;
        state.Cs = new SegmentState(8, 0, 0xffff_ffff, FlatCode);
        state.Ss = state.Ds = state.Es = state.Fs = state.Gs = new SegmentState(16, 0, 0xffff_ffff, FlatData);
        Vcpu.SetState(in state);
        X87State.Initialize(S);
    }

    public SoftVcpu Vcpu { get; }

    public VcpuBlock* S => Vcpu.Block;

    public DeviceBytes Registers { get; } = new();

    public byte* At(uint physical) => _memory.Host + physical;

    /// <summary>Runs one instruction placed at <see cref="Code"/>. Gives the vector it raised, or <see cref="Fault.None"/>.</summary>
    public byte Run(params ReadOnlySpan<byte> code)
    {
        _memory.TryWrite(new Gpa(Code), code);
        S->Rip = Code;
        return Vcpu.StepRaw();
    }

    public void Dispose()
    {
        Vcpu.Dispose();
        _code.Dispose();
        _memory.Dispose();
    }

    /// <summary>Memory behind a bus.</summary>
    internal sealed class DeviceBytes : IMmioDevice
    {
        private readonly byte[] _bytes = new byte[4096];

        public DeviceBytes()
        {
            for (int i = 0; i < _bytes.Length; i++)
                _bytes[i] = (byte)i;
        }

        public byte this[int offset] => _bytes[offset];

        public ulong Read(ulong offset, AccessSize size)
        {
            ulong value = 0;
            for (int i = 0; i < (int)size; i++)
                value |= (ulong)_bytes[(int)offset + i] << 8 * i;
            return value;
        }

        public void Write(ulong offset, AccessSize size, ulong value)
        {
            for (int i = 0; i < (int)size; i++)
                _bytes[(int)offset + i] = (byte)(value >> 8 * i);
        }
    }

    private sealed class NoApic : ILocalApic, IMmioDevice
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

        public ulong Read(ulong offset, AccessSize size) => ulong.MaxValue;

        public void Write(ulong offset, AccessSize size, ulong value)
        {
        }
    }
}
