using System;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Runs records on the software CPU, in the machine that a user program of the host sees: ring 3, the same descriptors, the window mapped.</summary>
internal sealed unsafe class SoftRunner : ICaseRunner
{
    /// <summary>What a repeated string instruction may stop for between iterations before it counts as one that never ends.</summary>
    private const int MaxResumptions = 10_000;
    private const byte HaltInstruction = 0xf4;
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(5);

    private readonly GuestMemory _memory;
    private readonly CodeCache _code;
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;
    private readonly byte* _window;
    private readonly byte* _pristine;
    private readonly bool _translate;

    /// <param name="pristine">The window's contents before every case.</param>
    /// <param name="translate">Everything is translated before it runs.</param>
    public SoftRunner(byte* pristine, bool translate = false)
    {
        _pristine = pristine;
        _translate = translate;
        _memory = new GuestMemory(2ul << 20, "oracle-soft");
        _code = new CodeCache(_memory, new ExecutionBarrier(), 16ul << 20, translate ? 16ul << 20 : 0, threshold: 1);
        VmClock clock = VmClock.CreateManual();
        _vcpu = new SoftVcpu(0, CpuModel.Parse("max"), _memory, new PortBus(), new MmioBus(), new AbsentApic(), clock, _code);
        _s = _vcpu.Block;
        _window = _memory.Host + UserMachine.WindowPhysical;
        UserMachine.Fill(_memory, pristine);
        CpuState state = UserMachine.InitialState();
        _vcpu.SetState(in state);
    }

    public bool IsAmd => _vcpu.Model.IsAmd;

    public byte* WindowBytes => _window;

    public void Step(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        if (_translate && record->Out.Rip != record->In.Rip)
        {
            RunTranslated(record, outcome, keepWindow);
            return;
        }
        Load(record);
        int written = (int)(record->CodeLength + record->LandingLength);
        new ReadOnlySpan<byte>(record->Code, written).CopyTo(new Span<byte>(CodeAt(record), written));
        byte vector;
        int resumptions = 0;
        do
        {
            vector = _vcpu.StepRaw();
        }
        while (vector == Fault.None && _s->Rip == record->In.Rip && IsRepeated(record) && ++resumptions < MaxResumptions);
        new Span<byte>(CodeAt(record), written).Fill(0xcc);
        Save(record, outcome, vector, keepWindow);
        if (resumptions == MaxResumptions)
            outcome->Vector = OracleRecord.TimedOut;
    }

    /// <summary>One instruction as the first of a block: whatever stops the vCPU elsewhere than at it comes after it. The jump back behind it ends in a fault.</summary>
    private void RunTranslated(OracleRecord* record, OracleRecord* outcome, bool keepWindow)
    {
        Load(record);
        int written = (int)(record->CodeLength + record->LandingLength);
        Gpa place = new(UserMachine.WindowPhysical + (record->CodeLinear - Window.Start));
        _memory.TryWrite(place, new ReadOnlySpan<byte>(record->Code, written));
        byte vector;
        using (Timer watchdog = new(static vcpu => ((SoftVcpu)vcpu!).Kick(), _vcpu, Patience, Timeout.InfiniteTimeSpan))
            vector = _vcpu.RunRaw();
        Span<byte> filler = stackalloc byte[written];
        filler.Fill(0xcc);
        _memory.TryWrite(place, filler);
        bool after = vector != Fault.None && _s->Rip != record->In.Rip;
        bool landed = after && record->LandingLength != 0 && _s->Rip == UserMachine.LandingTarget(record);
        Save(record, outcome, after ? Fault.None : vector, keepWindow);
        if (landed)
        {
            outcome->Out.Rip = record->In.Rip + record->CodeLength;
            outcome->Out.Selectors[1] = record->In.Selectors[1];
        }
        if (vector == Fault.None)
            outcome->Vector = OracleRecord.TimedOut;
    }

    public void RunBlock(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        Load(record);
        int length = (int)record->CodeLength;
        Span<byte> code = stackalloc byte[OracleRecord.MaxCode + 1];
        new ReadOnlySpan<byte>(record->Code, length).CopyTo(code);
        // The end: a privileged instruction, whose fault stops the run there.
        code[length] = HaltInstruction;
        Gpa place = new(UserMachine.WindowPhysical + (record->CodeLinear - Window.Start));
        _memory.TryWrite(place, code[..(length + 1)]);
        byte vector;
        using (Timer watchdog = new(static vcpu => ((SoftVcpu)vcpu!).Kick(), _vcpu, Patience, Timeout.InfiniteTimeSpan))
            vector = _vcpu.RunRaw();
        code[..(length + 1)].Fill(0xcc);
        _memory.TryWrite(place, code[..(length + 1)]);
        Save(record, outcome, vector, keepWindow);
        if (vector == Fault.None)
            outcome->Vector = OracleRecord.TimedOut;
        else if (vector == (byte)ExceptionVector.GeneralProtection && _s->Rip == record->In.Rip + (ulong)length)
            outcome->Vector = OracleRecord.NoVector;
    }

    public void Dispose()
    {
        _vcpu.Dispose();
        _code.Dispose();
        _memory.Dispose();
    }

    private static bool IsRepeated(OracleRecord* record)
    {
        for (int i = 0; i < record->CodeLength; i++)
        {
            if (record->Code[i] is 0xf2 or 0xf3)
                return true;
        }
        return false;
    }

    private byte* CodeAt(OracleRecord* record) => _window + (record->CodeLinear - Window.Start);

    private void Load(OracleRecord* record)
    {
        UserState* state = &record->In;
        if (record->PatchLength > 0)
        {
            new ReadOnlySpan<byte>(record->Patch, (int)record->PatchLength)
                .CopyTo(new Span<byte>(_window + (record->PatchLinear - Window.Start), (int)record->PatchLength));
        }
        for (int i = 0; i < 16; i++)
            _s->Gpr[i] = state->Gpr[i];
        _s->Rip = state->Rip;
        LazyFlags.Write(_s, state->Flags);
        for (int i = 0; i < 6; i++)
        {
            SegmentState segment = Descriptors.Load(state->Selectors[i]);
            if (i >= 4 && state->Selectors[i] <= 3)
                segment.Base = i == 4 ? state->FsBase : state->GsBase;
            _vcpu.SetSegment(i, in segment);
        }
        _s->Cpl = 3;
        _vcpu.UpdateMode();
        _vcpu.UpdateAllBounds();
        _s->Mxcsr = state->Mxcsr;
        Buffer.MemoryCopy(state->Ymm, _s->Vector, 512, 512);
        XsaveArea.ReadX87(_s, state->Fx);
        // The helper's FNINIT cleared the error pointers.
        _s->FpuOpcode = _s->FpuCs = _s->FpuDs = 0;
        _s->FpuIp = _s->FpuDp = 0;
        X87State.MirrorPointers(_s);
    }

    private void Save(OracleRecord* record, OracleRecord* outcome, byte vector, bool keepWindow)
    {
        UserState* state = &outcome->Out;
        for (int i = 0; i < 16; i++)
            state->Gpr[i] = _s->Gpr[i];
        state->Rip = _s->Rip;
        state->Flags = LazyFlags.Read(_s);
        for (int i = 0; i < 6; i++)
            state->Selectors[i] = _s->SegSelector[i];
        state->FsBase = _s->SegBase[4];
        state->GsBase = _s->SegBase[5];
        Buffer.MemoryCopy(_s->Vector, state->Ymm, 512, 512);
        XsaveArea.WriteX87(_s, state->Fx, allPointers: false);
        state->Mxcsr = _s->Mxcsr;
        outcome->Vector = vector == Fault.None ? OracleRecord.NoVector : vector;
        outcome->Error = vector != Fault.None && _s->FaultHasError ? _s->FaultError : 0;
        outcome->Cr2 = vector == (byte)ExceptionVector.PageFault ? _s->FaultAddress : 0;
        outcome->Hash = keepWindow ? 0 : WindowHash.TakeChanges(_window, _pristine);
        if (keepWindow)
            return;
        outcome->CodeLinear = record->CodeLinear;
    }

    public void Clean() => WindowHash.TakeChanges(_window, _pristine);

    /// <summary>No interrupt ever comes.</summary>
    private sealed class AbsentApic : ILocalApic, IMmioDevice
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

        public ulong Read(ulong offset, AccessSize size) => ulong.MaxValue;

        public void Write(ulong offset, AccessSize size, ulong value)
        {
        }
    }
}
