using System;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Cpu.Tests.Oracle;
using Kvasir.Machine;
using Kvasir.X86;

namespace Kvasir.Kvm.Tests;

/// <summary>Runs records in a guest, as a user program or in its kernel. Exceptions end in the guest's handlers, which tell of them through ports.</summary>
internal sealed unsafe class GuestRunner : ICaseRunner, IPortDevice
{
    private const byte HaltInstruction = 0xf4;

    /// <summary>OUT <see cref="KernelMachine.EndPort"/>, AL, and a jump to itself: a processor that is told to stop may go on for a little.</summary>
    private const int EndLength = 4;
    private const int OutLength = 2;
    private const int LegacyBytes = 512;
    private const int HeaderBytes = 64;

    /// <summary>XMM registers in an XSAVE image, and the upper halves of YMM.</summary>
    private const int XmmAt = 160;
    private const int YmmHighAt = LegacyBytes + HeaderBytes;

    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(20);

    private readonly CasePlace _place;
    private readonly byte* _pristine;
    private readonly byte* _window;
    private readonly byte[] _before = new byte[Window.Size];
    private readonly VmClock _clock;
    private readonly GuestMemory _memory;
    private readonly IProcessorFactory _processors;
    private readonly IVcpu _vcpu;
    private readonly CpuState _initial;
    private readonly CpuModel _model;
    private readonly Timer _watchdog;
    private int _vector;

    /// <param name="pristine">The window's contents before every case.</param>
    /// <param name="place">Where the cases run.</param>
    /// <param name="kvm">On KVM; on the software CPU otherwise.</param>
    public GuestRunner(byte* pristine, CasePlace place, bool kvm)
    {
        _place = place;
        _pristine = pristine;
        // A KVM that emulates kernels has no paging outside 64-bit mode.
        bool flat = place == CasePlace.Real || (place == CasePlace.Protected && kvm && !Rig.Probe.IsHardware);
        _initial = KernelMachine.InitialState(place, paging: !flat);
        _clock = new VmClock(tscFrequency: kvm ? Rig.Probe.TscFrequency : VmClock.DefaultTscFrequency);
        _memory = new GuestMemory(flat ? KernelMachine.FlatMemorySize : UserMachine.MemorySize, "oracle-guest");
        UserMachine.Fill(_memory, pristine);
        UserMachine.FillHandlers(_memory);
        KernelMachine.Fill(_memory, place);
        _window = _memory.Host + UserMachine.WindowPhysical;
        if (flat)
        {
            byte* filled = _window;
            _window = _memory.Host + Window.Start;
            Buffer.MemoryCopy(filled, _window, Window.Size, Window.Size);
        }
        PortBus ports = new();
        ports.Map(0, KernelMachine.EndPort + 1, this);
        _model = CpuModel.Parse("host", 1, _clock.TscFrequency);
        using SpeedLoop parts = new();
        _processors = kvm
            ? new KvmProcessors(new KvmSystem(), _model, _memory, ports, new MmioBus(), _clock, mendsRing3: Rig.Probe.Ring3NeedsMending)
            : new SoftwareProcessors(_model, _memory, ports, new MmioBus(), _clock, ExecutionEngine.Interpreter, new AcceleratorLogs());
        _vcpu = _processors.Create(0, parts.Apic);
        _watchdog = new Timer(_ => _vcpu.Kick());
    }

    private bool EndsByPort => _place is CasePlace.Protected or CasePlace.Real;

    public bool IsAmd => _model.IsAmd;

    public byte* WindowBytes => _window;

    public void Step(OracleRecord* record, OracleRecord* outcome, bool keepWindow = false)
    {
        Span<byte> code = stackalloc byte[OracleRecord.CodeSpace + EndLength];
        code = code[..Compose(record, EndsByPort, new ReadOnlySpan<byte>(record->Code + record->CodeLength, (int)record->LandingLength), code)];
        RunCode(record, outcome, keepWindow, code);
        if (EndsByPort)
            return;
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
        Span<byte> code = stackalloc byte[OracleRecord.CodeSpace + EndLength];
        // The end: a privileged instruction.
        code = code[..Compose(record, _place != CasePlace.Ring3, [HaltInstruction], code)];
        RunCode(record, outcome, keepWindow, code);
        if (outcome->Vector == (uint)ExceptionVector.GeneralProtection && outcome->Out.Rip == record->In.Rip + record->CodeLength)
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

    /// <summary>A record's code and what ends it, in <paramref name="to"/>. Gives its length.</summary>
    private static int Compose(OracleRecord* record, bool byPort, ReadOnlySpan<byte> otherwise, Span<byte> to)
    {
        ReadOnlySpan<byte> end = byPort ? [0xe6, KernelMachine.EndPort, 0xeb, 0xfe] : otherwise;
        new ReadOnlySpan<byte>(record->Code, (int)record->CodeLength).CopyTo(to);
        end.CopyTo(to[(int)record->CodeLength..]);
        return (int)record->CodeLength + end.Length;
    }

    /// <summary>
    /// What the place can run as a user program of the host does: there is room for the end, the code goes where it finds the window's code only, and in real mode no
    /// segment expands down.
    /// </summary>
    private bool CanRun(OracleRecord* record, int length)
    {
        if (!EndsByPort)
            return true;
        uint codeBase = (uint)Descriptors.Load(record->In.Selectors[1]).Base;
        if (record->CodeLinear + (uint)length > Window.CodeEnd || (uint)record->Out.Rip + codeBase - Window.Start >= Window.CodeEnd - Window.Start)
            return false;
        if (_place != CasePlace.Real)
            return true;
        for (int i = 0; i < 6; i++)
        {
            if (record->In.Selectors[i] == Descriptors.ExpandDown)
                return false;
        }
        return true;
    }

    /// <summary>Code goes where the processors' caches of it hear of it.</summary>
    private void RunCode(OracleRecord* record, OracleRecord* outcome, bool keepWindow, Span<byte> code)
    {
        if (!CanRun(record, code.Length))
        {
            outcome->Vector = OracleRecord.ShutDown;
            return;
        }
        Gpa place = new((ulong)(_window - _memory.Host) + (record->CodeLinear - Window.Start));
        _memory.TryWrite(place, code);
        Run(record, outcome, keepWindow);
        code.Fill(0xcc);
        _memory.TryWrite(place, code);
    }

    private void Run(OracleRecord* record, OracleRecord* outcome, bool keepWindow)
    {
        if (record->PatchLength > 0)
            new ReadOnlySpan<byte>(record->Patch, (int)record->PatchLength).CopyTo(new Span<byte>(_window + (record->PatchLinear - Window.Start), (int)record->PatchLength));
        CpuState state = Load(record);
        if (EndsByPort)
            new ReadOnlySpan<byte>(_window, (int)Window.Size).CopyTo(_before);
        _vcpu.SetState(in state);
        _vector = -1;
        _watchdog.Change(s_patience, Timeout.InfiniteTimeSpan);
        VcpuExit exit = _vcpu.Run();
        _watchdog.Change(Timeout.InfiniteTimeSpan, Timeout.InfiniteTimeSpan);
        if (exit != VcpuExit.Kicked && !(exit == VcpuExit.TripleFault && EndsByPort))
            throw new InvalidOperationException($"the case ended the vCPU: {exit}; {_vcpu.FailureReport}");
        _vcpu.GetState(out state);
        Save(record, in state, outcome);
        if (exit == VcpuExit.TripleFault)
            outcome->Vector = OracleRecord.ShutDown;
        outcome->Hash = keepWindow ? 0 : WindowHash.TakeChanges(_window, _pristine);
    }

    private CpuState Load(OracleRecord* record)
    {
        UserState* from = &record->In;
        CpuState state = _initial;
        new ReadOnlySpan<ulong>(from->Gpr, 16).CopyTo(state.Gpr);
        state.Rip = from->Rip;
        state.Rflags = from->Flags | 0x202;
        (state.Es, state.Cs, state.Ss) = (Segment(from, 0), Segment(from, 1), Segment(from, 2));
        (state.Ds, state.Fs, state.Gs) = (Segment(from, 3), Segment(from, 4), Segment(from, 5));
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

    private SegmentState Segment(UserState* from, int number)
    {
        SegmentState segment = Descriptors.Load(from->Selectors[number]);
        if (number >= 4 && from->Selectors[number] <= 3)
            segment.Base = number == 4 ? from->FsBase : from->GsBase;
        return KernelMachine.Segment(_place, number, segment);
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
        // Outside 64-bit mode the error pointers have selectors, which a 64-bit kernel's FXSAVE64 does not show.
        if (record->Mode != 64)
            *(uint*)(to->Fx + UserState.Fip + 4) = *(uint*)(to->Fx + UserState.Fdp + 4) = 0;
        // AMD's processors show a program the error pointers only while an exception is pending (APM vol. 2, "Exception Pointers"). The software CPU keeps them.
        if (IsAmd && (*(ushort*)(to->Fx + UserState.Fsw) & 0x80) == 0)
            new Span<byte>(to->Fx, LegacyBytes)[UserState.Fop..(UserState.Fdp + 8)].Clear();
        // What the place has instead of a user program's selectors is none of the outcome.
        (to->Selectors[1], to->Selectors[2]) = (record->In.Selectors[1], record->In.Selectors[2]);
        to->Rip = state.Rip;
        to->Flags = state.Rflags;
        switch (_vector)
        {
            case < 0:
                return;
            case KernelMachine.EndPort:
                to->Rip -= OutLength;
                outcome->Vector = OracleRecord.NoVector;
                return;
        }
        bool hasCode = _vector is 8 or (>= 10 and <= 14) or 17;
        if (EndsByPort)
            TakeFrame(record, in state, outcome, hasCode && _place == CasePlace.Protected);
        else
            TakeLongFrame(in state, outcome, hasCode);
    }

    /// <summary>Intel SDM vol. 3, "64-Bit Mode Stack Frame".</summary>
    private void TakeLongFrame(in CpuState state, OracleRecord* outcome, bool hasCode)
    {
        UserState* to = &outcome->Out;
        ulong frame = state.Gpr[4];
        if (hasCode)
        {
            outcome->Error = (uint)Frame(frame);
            frame += 8;
        }
        to->Rip = Frame(frame);
        to->Flags = Frame(frame + 16);
        to->Gpr[4] = Frame(frame + 24);
        if (_place != CasePlace.Ring3)
            return;
        to->Selectors[1] = (ushort)Frame(frame + 8);
        to->Selectors[2] = (ushort)Frame(frame + 32);
    }

    /// <summary>
    /// On the case's own stack (Intel SDM vol. 3, "Exception and Interrupt Handling", and for real mode "Interrupt and Exception Handling" of chapter 21). What it
    /// lies on becomes what was there: no instruction that ends here has written below its stack pointer.
    /// </summary>
    private void TakeFrame(OracleRecord* record, in CpuState state, OracleRecord* outcome, bool hasCode)
    {
        UserState* to = &outcome->Out;
        bool real = _place == CasePlace.Real;
        int size = real ? 6 : hasCode ? 16 : 12;
        uint mask = (state.Ss.Attributes & 0x4000) != 0 ? uint.MaxValue : 0xffff;
        uint top = (uint)state.Gpr[4];
        Span<byte> bytes = stackalloc byte[size];
        for (int i = 0; i < size; i++)
        {
            uint at = (uint)state.Ss.Base + (top + (uint)i & mask) - Window.Start;
            if (at >= Window.Size)
            {
                outcome->Vector = OracleRecord.ShutDown;
                return;
            }
            bytes[i] = _window[at];
            _window[at] = _before[at];
        }
        to->Gpr[4] = state.Gpr[4] & ~(ulong)mask | (top + (uint)size & mask);
        if (real)
        {
            to->Rip = MemoryMarshal.Read<ushort>(bytes);
            // Real mode keeps sixteen of the flags, and clears AC.
            to->Flags = record->In.Flags & ~0xfffful | MemoryMarshal.Read<ushort>(bytes[4..]);
            return;
        }
        if (hasCode)
        {
            outcome->Error = MemoryMarshal.Read<uint>(bytes);
            bytes = bytes[4..];
        }
        to->Rip = MemoryMarshal.Read<uint>(bytes);
        to->Flags = MemoryMarshal.Read<uint>(bytes[8..]);
    }

    private ulong Frame(ulong linear) =>
        _memory.TryRead(new Gpa(linear - UserMachine.KernelLinear), out ulong value) ? value : throw new InvalidOperationException("the handler's stack is elsewhere");
}
