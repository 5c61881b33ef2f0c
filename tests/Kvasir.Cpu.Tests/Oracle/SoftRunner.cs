using System;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Runs records on the software CPU, in the machine that a user program of the host sees: ring 3, the same descriptors, the window mapped.</summary>
internal sealed unsafe class SoftRunner : IDisposable
{
    private const ulong KernelLinear = 0xffff_8000_0000_0000;
    private const ulong WindowPhysical = 0x10_0000;
    private const ulong Pml4 = 0x1000;
    private const ulong KernelPdpt = 0x2000;
    private const ulong KernelDirectory = 0x3000;
    private const ulong KernelTable = 0x4000;
    private const ulong UserPdpt = 0x5000;
    private const ulong UserDirectory = 0x6000;
    private const ulong UserTable = 0x7000;
    private const ulong Gdt = 0x8000;
    private const ulong Ldt = 0x9000;
    private const ulong Tss = 0xa000;
    private const uint TssLimit = 0x67;
    private const ulong TssBitmapBase = 0x66;

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
        _window = _memory.Host + WindowPhysical;
        FillMemory();
        CpuState state = InitialState();
        _vcpu.SetState(in state);
    }

    /// <summary>The vCPU decodes as AMD's processors do.</summary>
    public bool IsAmd => _vcpu.Model.IsAmd;

    /// <summary>The window after the last run that kept it.</summary>
    public byte* WindowBytes => _window;

    /// <summary>Runs one instruction of a record's input.</summary>
    /// <param name="record">The case; only its output may have been used before.</param>
    /// <param name="outcome">Gets <see cref="OracleRecord.Out"/> and what follows it.</param>
    /// <param name="keepWindow">The window keeps what the code left there.</param>
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
        Gpa place = new(WindowPhysical + (record->CodeLinear - Window.Start));
        _memory.TryWrite(place, new ReadOnlySpan<byte>(record->Code, written));
        byte vector;
        using (Timer watchdog = new(static vcpu => ((SoftVcpu)vcpu!).Kick(), _vcpu, Patience, Timeout.InfiniteTimeSpan))
            vector = _vcpu.RunRaw();
        Span<byte> filler = stackalloc byte[written];
        filler.Fill(0xcc);
        _memory.TryWrite(place, filler);
        bool after = vector != Fault.None && _s->Rip != record->In.Rip;
        bool landed = after && record->LandingLength != 0 && _s->Rip == LandingTarget(record);
        Save(record, outcome, after ? Fault.None : vector, keepWindow);
        if (landed)
        {
            outcome->Out.Rip = record->In.Rip + record->CodeLength;
            outcome->Out.Selectors[1] = record->In.Selectors[1];
        }
        if (vector == Fault.None)
            outcome->Vector = OracleRecord.TimedOut;
    }

    /// <summary>Where the jump back leads: relative in 64-bit code, far elsewhere.</summary>
    private static ulong LandingTarget(OracleRecord* record)
    {
        byte* landing = record->Code + record->CodeLength;
        if (record->Mode == 64)
            return record->In.Rip + record->CodeLength + record->LandingLength + (ulong)(long)*(int*)(landing + 1);
        return *(uint*)(landing + record->LandingLength - 6);
    }

    /// <summary>Runs a record's input as blocks, up to its end or a fault.</summary>
    public void RunBlock(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        Load(record);
        int length = (int)record->CodeLength;
        Span<byte> code = stackalloc byte[OracleRecord.MaxCode + 1];
        new ReadOnlySpan<byte>(record->Code, length).CopyTo(code);
        // The end: a privileged instruction, whose fault stops the run there.
        code[length] = HaltInstruction;
        Gpa place = new(WindowPhysical + (record->CodeLinear - Window.Start));
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

    /// <summary>Makes the window pristine after a run that kept it.</summary>
    public void Clean() => WindowHash.TakeChanges(_window, _pristine);

    private void FillMemory()
    {
        const ulong table = (ulong)(PageEntry.Present | PageEntry.Writable | PageEntry.Accessed);
        const ulong user = (ulong)PageEntry.User;
        Put(Pml4 + 256 * 8, KernelPdpt | table);
        Put(KernelPdpt, KernelDirectory | table);
        Put(KernelDirectory, KernelTable | table);
        for (ulong page = 0; page < 256; page++)
            Put(KernelTable + page * 8, page << 12 | table | (ulong)PageEntry.Dirty);
        Put(Pml4, UserPdpt | table | user);
        Put(UserPdpt, UserDirectory | table | user);
        Put(UserDirectory + (Window.Start >> 21) * 8, UserTable | table | user);
        for (uint page = 0; page < Window.Pages; page++)
        {
            if (!Window.IsMapped(page))
                continue;
            ulong entry = WindowPhysical + page * 4096 | (ulong)(PageEntry.Present | PageEntry.Accessed) | user;
            if (Window.IsWritable(page))
                entry |= (ulong)(PageEntry.Writable | PageEntry.Dirty);
            if (!Window.IsCode(page))
                entry |= (ulong)PageEntry.NoExecute;
            Put(UserTable + page * 8, entry);
        }
        foreach (ushort selector in Descriptors.Loadable)
        {
            SegmentState segment = Descriptors.Load(selector);
            if ((segment.Attributes & (uint)SegmentAttributes.Unusable) == 0)
                Put(((selector & 4) != 0 ? Ldt : Gdt) + (selector & 0xfff8u), Descriptors.Encode(segment));
        }
        // The I/O permission bitmap lies beyond the limit: no port is allowed.
        *(ushort*)(_memory.Host + Tss + TssBitmapBase) = (ushort)TssLimit + 1;
        Buffer.MemoryCopy(_pristine, _window, Window.Size, Window.Size);
        new Span<byte>(_window, 0x2000).Fill(0xcc);
    }

    private void Put(ulong physical, ulong value) => *(ulong*)(_memory.Host + physical) = value;

    private static CpuState InitialState()
    {
        CpuState state = CpuState.AtReset();
        state.Rflags = 0x202;
        state.Cr0 = (ulong)(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG);
        state.Cr3 = Pml4;
        state.Cr4 = (ulong)(Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.OSXSAVE);
        state.Efer = (ulong)(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE);
        state.Xcr0 = 7;
        state.Cs = Descriptors.Load(Descriptors.Code64);
        state.Ss = Descriptors.Load(Descriptors.Data);
        state.Ds = state.Es = state.Fs = state.Gs = Descriptors.Load(0);
        // As Linux has it: 16 entries, and as many LDT entries as oracle.c makes.
        state.Gdtr = new TableState(KernelLinear + Gdt, 127);
        state.Ldtr = new SegmentState(0x68, KernelLinear + Ldt, 63, 0x82);
        state.Tr = new SegmentState(0x40, KernelLinear + Tss, TssLimit, 0x8b);
        state.Idtr = new TableState(KernelLinear + 0xb000, 0xfff);
        return state;
    }

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
