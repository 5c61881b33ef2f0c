using System;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Cpu.Tests.Oracle;
using Kvasir.Machine;
using Kvasir.X86;

namespace Kvasir.Kvm.Tests;

/// <summary>Runs records in a KVM guest, as a user program there. Exceptions end in the guest's handlers, which tell of them through ports.</summary>
internal sealed unsafe class KvmRunner : ICaseRunner, IPortDevice
{
    private const byte HaltInstruction = 0xf4;
    private const int LegacyBytes = 512;
    private const int HeaderBytes = 64;

    /// <summary>XMM registers in an XSAVE image, and the upper halves of YMM.</summary>
    private const int XmmAt = 160;
    private const int YmmHighAt = LegacyBytes + HeaderBytes;

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private readonly byte* _pristine;
    private readonly byte* _window;
    private readonly VmClock _clock;
    private readonly GuestMemory _memory;
    private readonly KvmProcessors _processors;
    private readonly IVcpu _vcpu;
    private readonly CpuState _initial = UserMachine.InitialState();
    private readonly CpuModel _model;
    private readonly Timer _watchdog;
    private int _vector;

    public KvmRunner(byte* pristine)
    {
        _pristine = pristine;
        _clock = new VmClock(tscFrequency: Rig.Probe.TscFrequency);
        _memory = new GuestMemory(UserMachine.MemorySize, "oracle-kvm");
        UserMachine.Fill(_memory, pristine);
        UserMachine.FillHandlers(_memory);
        _window = _memory.Host + UserMachine.WindowPhysical;
        PortBus ports = new();
        ports.Map(0, UserMachine.Vectors, this);
        _model = CpuModel.Parse("host", 1, _clock.TscFrequency);
        using SpeedLoop parts = new();
        _processors = new KvmProcessors(new KvmSystem(), _model, _memory, ports, new MmioBus(), _clock, mendsRing3: Rig.Probe.Ring3NeedsMending);
        _vcpu = _processors.Create(0, parts.Apic);
        _watchdog = new Timer(_ => _vcpu.Kick());
    }

    public bool IsAmd => _model.IsAmd;

    public byte* WindowBytes => _window;

    public void Step(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        int written = (int)(record->CodeLength + record->LandingLength);
        Span<byte> place = CodeAt(record, written);
        new ReadOnlySpan<byte>(record->Code, written).CopyTo(place);
        Run(record, outcome, keepWindow);
        place.Fill(0xcc);
        // What the jump back behind the instruction met.
        bool landed = outcome->Vector != OracleRecord.TimedOut && record->LandingLength != 0 && outcome->Out.Rip == UserMachine.LandingTarget(record);
        if (landed)
        {
            outcome->Vector = OracleRecord.NoVector;
            outcome->Out.Rip = record->In.Rip + record->CodeLength;
            outcome->Out.Selectors[1] = record->In.Selectors[1];
        }
    }

    public void RunBlock(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        int length = (int)record->CodeLength;
        Span<byte> place = CodeAt(record, length + 1);
        new ReadOnlySpan<byte>(record->Code, length).CopyTo(place);
        // The end: a privileged instruction.
        place[length] = HaltInstruction;
        Run(record, outcome, keepWindow);
        place.Fill(0xcc);
        if (outcome->Vector == (uint)ExceptionVector.GeneralProtection && outcome->Out.Rip == record->In.Rip + (ulong)length)
            outcome->Vector = OracleRecord.NoVector;
    }

    public void Clean() => WindowHash.TakeChanges(_window, _pristine);

    public uint ReadPort(ushort port, AccessSize size) => 0;

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        _vector = port;
        _vcpu.Kick();
    }

    public void Dispose()
    {
        _watchdog.Dispose();
        _clock.Dispose();
        _vcpu.Dispose();
        _processors.Dispose();
        _memory.Dispose();
    }

    private Span<byte> CodeAt(OracleRecord* record, int length) => new(_window + (record->CodeLinear - Window.Start), length);

    private void Run(OracleRecord* record, OracleRecord* outcome, bool keepWindow)
    {
        if (record->PatchLength > 0)
            new ReadOnlySpan<byte>(record->Patch, (int)record->PatchLength).CopyTo(new Span<byte>(_window + (record->PatchLinear - Window.Start), (int)record->PatchLength));
        CpuState state = Load(record);
        _vcpu.SetState(in state);
        _vector = -1;
        _watchdog.Change(s_patience, Timeout.InfiniteTimeSpan);
        VcpuExit exit = _vcpu.Run();
        _watchdog.Change(Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
        if (exit != VcpuExit.Kicked)
            throw new InvalidOperationException($"the case ended the vCPU: {exit}; {_vcpu.FailureReport}");
        _vcpu.GetState(out state);
        Save(record, in state, outcome);
        outcome->Hash = keepWindow ? 0 : WindowHash.TakeChanges(_window, _pristine);
    }

    private CpuState Load(OracleRecord* record)
    {
        UserState* from = &record->In;
        CpuState state = _initial;
        new ReadOnlySpan<ulong>(from->Gpr, 16).CopyTo(state.Gpr);
        state.Rip = from->Rip;
        state.Rflags = from->Flags | 0x202;
        state.Es = Segment(from, 0);
        state.Cs = Segment(from, 1);
        state.Ss = Segment(from, 2);
        state.Ds = Segment(from, 3);
        state.Fs = Segment(from, 4);
        state.Gs = Segment(from, 5);
        Span<byte> image = MemoryMarshal.AsBytes((Span<ulong>)state.Xsave);
        image.Clear();
        new ReadOnlySpan<byte>(from->Fx, XmmAt).CopyTo(image);
        // The helper's FNINIT cleared the error pointers.
        image[UserState.Fop..(UserState.Fdp + 8)].Clear();
        for (int i = 0; i < 16; i++)
        {
            new ReadOnlySpan<byte>(from->Ymm + i * 32, 16).CopyTo(image[(XmmAt + i * 16)..]);
            new ReadOnlySpan<byte>(from->Ymm + i * 32 + 16, 16).CopyTo(image[(YmmHighAt + i * 16)..]);
        }
        state.Xsave[LegacyBytes / 8] = 7;
        return state;
    }

    private static SegmentState Segment(UserState* from, int number)
    {
        SegmentState segment = Descriptors.Load(from->Selectors[number]);
        if (number >= 4 && from->Selectors[number] <= 3)
            segment.Base = number == 4 ? from->FsBase : from->GsBase;
        return segment;
    }

    private void Save(OracleRecord* record, in CpuState state, OracleRecord* outcome)
    {
        UserState* to = &outcome->Out;
        ((ReadOnlySpan<ulong>)state.Gpr).CopyTo(new Span<ulong>(to->Gpr, 16));
        outcome->CodeLinear = record->CodeLinear;
        outcome->Vector = _vector < 0 ? OracleRecord.TimedOut : (uint)_vector;
        outcome->Error = 0;
        outcome->Cr2 = _vector == (int)ExceptionVector.PageFault ? state.Cr2 : 0;
        (to->Selectors[0], to->Selectors[3], to->Selectors[4], to->Selectors[5]) = (state.Es.Selector, state.Ds.Selector, state.Fs.Selector, state.Gs.Selector);
        (to->FsBase, to->GsBase) = (state.Fs.Base, state.Gs.Base);
        ReadOnlySpan<byte> image = MemoryMarshal.AsBytes((ReadOnlySpan<ulong>)state.Xsave);
        image[..LegacyBytes].CopyTo(new Span<byte>(to->Fx, LegacyBytes));
        for (int i = 0; i < 16; i++)
        {
            image.Slice(XmmAt + i * 16, 16).CopyTo(new Span<byte>(to->Ymm + i * 32, 16));
            image.Slice(YmmHighAt + i * 16, 16).CopyTo(new Span<byte>(to->Ymm + i * 32 + 16, 16));
        }
        if (_vector < 0)
        {
            to->Rip = state.Rip;
            to->Flags = state.Rflags;
            return;
        }
        // The handler's frame (Intel SDM vol. 3, "64-Bit Mode Stack Frame").
        ulong frame = state.Gpr[4];
        if (_vector is 8 or (>= 10 and <= 14) or 17)
        {
            outcome->Error = (uint)Frame(frame);
            frame += 8;
        }
        to->Rip = Frame(frame);
        to->Selectors[1] = (ushort)Frame(frame + 8);
        to->Flags = Frame(frame + 16);
        to->Gpr[4] = Frame(frame + 24);
        to->Selectors[2] = (ushort)Frame(frame + 32);
    }

    private ulong Frame(ulong linear) =>
        _memory.TryRead(new Gpa(linear - UserMachine.KernelLinear), out ulong value) ? value : throw new InvalidOperationException("the handler's stack is elsewhere");
}
