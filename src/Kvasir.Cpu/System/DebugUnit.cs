using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Debug registers, breakpoints and single-step traps (Intel SDM vol. 3, ch. "Debug").</summary>
public sealed unsafe class DebugUnit
{
    // DR6.
    private const ulong Dr6Fixed = 0xffff_0ff0;
    private const ulong Dr6Writable = 0xe00f;
    private const ulong GeneralDetect = 1 << 13;
    private const ulong SingleStep = 1 << 14;
    private const ulong TaskSwitch = 1 << 15;

    // DR7.
    private const ulong Dr7Fixed = 0x400;
    private const ulong Dr7Writable = 0xffff_23ff;
    private const ulong EnableBits = 0xff;
    private const ulong LocalEnables = 0x155;
    private const ulong GeneralDetectEnable = 1 << 13;

    // Kinds of a breakpoint: the R/W field of DR7.
    private const int OnExecution = 0;
    private const int OnWrite = 1;
    private const int OnPort = 2;

    // Wiring
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    // State
    private readonly ulong[] _addresses = new ulong[4];
    private ulong _dr6 = Dr6Fixed;
    private ulong _dr7 = Dr7Fixed;
    private ulong _matches;
    private bool _stepSuppressed;

    internal DebugUnit(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    /// <summary>Some breakpoint is enabled in DR7: instructions run one by one.</summary>
    public bool IsActive { get; private set; }

    /// <summary>A data breakpoint is enabled: every access goes through <see cref="CheckData"/>.</summary>
    public bool HasDataBreakpoints { get; private set; }

    /// <summary>A breakpoint on port accesses is enabled, with CR4.DE.</summary>
    public bool HasPortBreakpoints { get; private set; }

    /// <summary>The #DB that is recorded is the fault of an access to the debug registers while DR7.GD was set.</summary>
    internal bool FaultIsGeneralDetect { get; private set; }

    /// <summary>Before an instruction at a linear address: true where a code breakpoint matched; #DB is recorded then.</summary>
    public bool CheckCode(ulong linear)
    {
        if (!IsActive)
            return false;
        ulong matched = 0;
        for (int i = 0; i < 4; i++)
        {
            if (IsEnabled(i) && Kind(i) == OnExecution && Length(i) == 1 && _addresses[i] == linear)
                matched |= 1ul << i;
        }
        if (matched == 0)
            return false;
        _dr6 |= matched;
        Access.Record(_s, ExceptionVector.Debug);
        return true;
    }

    /// <summary>Notes a data access; a match traps after the instruction.</summary>
    public void CheckData(ulong linear, int size, bool write)
    {
        for (int i = 0; i < 4; i++)
        {
            int kind = Kind(i);
            bool watched = IsEnabled(i) && kind is not (OnExecution or OnPort) && (write || kind != OnWrite);
            if (watched && Overlaps(i, linear, size))
                _matches |= 1ul << i;
        }
    }

    /// <summary>Notes a port access; a match traps after the instruction.</summary>
    public void CheckPort(ushort port, int size)
    {
        for (int i = 0; i < 4; i++)
        {
            if (IsEnabled(i) && Kind(i) == OnPort && Overlaps(i, port, size))
                _matches |= 1ul << i;
        }
    }

    /// <summary>Forgets matches of earlier instructions.</summary>
    public void BeginInstruction()
    {
        _matches = 0;
        _stepSuppressed = false;
    }

    /// <summary>After an instruction that completed: records #DB for a single step or for data breakpoints that matched.</summary>
    public void EndInstruction(bool singleStep)
    {
        singleStep &= !_stepSuppressed;
        if (_matches == 0 && !singleStep)
            return;
        _dr6 |= _matches | (singleStep ? SingleStep : 0);
        _matches = 0;
        Access.Record(_s, ExceptionVector.Debug);
    }

    /// <summary>The instruction cleared TF by entering a handler: it does not trap.</summary>
    internal void SuppressStep() => _stepSuppressed = true;

    /// <summary>A task switch disables the local breakpoints.</summary>
    internal void TaskSwitched()
    {
        _stepSuppressed = true;
        _dr7 &= ~LocalEnables;
        Update();
    }

    /// <summary>The new task's TSS asks for a trap at its first instruction.</summary>
    internal void TrapTask()
    {
        _dr6 |= TaskSwitch;
        Access.Record(_s, ExceptionVector.Debug);
    }

    /// <summary>Before MOV to or from a debug register. False: DR7.GD asked for #DB, which is recorded.</summary>
    internal bool TryAccess()
    {
        if ((_dr7 & GeneralDetectEnable) == 0)
            return true;
        _dr6 |= GeneralDetect;
        FaultIsGeneralDetect = true;
        return Access.Record(_s, ExceptionVector.Debug);
    }

    /// <summary>#DB was delivered: the handler may use the debug registers.</summary>
    internal void Delivered()
    {
        FaultIsGeneralDetect = false;
        _dr7 &= ~GeneralDetectEnable;
    }

    internal ulong Read(int number) => number switch
    {
        < 4 => _addresses[number],
        6 => _dr6,
        _ => _dr7,
    };

    internal void Write(int number, ulong value)
    {
        if (number < 4)
            _addresses[number] = value;
        else if (number == 6)
            _dr6 = (value & Dr6Writable) | Dr6Fixed;
        else
            _dr7 = (value & Dr7Writable) | Dr7Fixed;
        Update();
    }

    internal void Get(ref CpuState state)
    {
        state.Dr0 = _addresses[0];
        state.Dr1 = _addresses[1];
        state.Dr2 = _addresses[2];
        state.Dr3 = _addresses[3];
        state.Dr6 = _dr6;
        state.Dr7 = _dr7;
    }

    internal void Set(in CpuState state)
    {
        _addresses[0] = state.Dr0;
        _addresses[1] = state.Dr1;
        _addresses[2] = state.Dr2;
        _addresses[3] = state.Dr3;
        _dr6 = (state.Dr6 & Dr6Writable) | Dr6Fixed;
        _dr7 = (state.Dr7 & Dr7Writable) | Dr7Fixed;
        _matches = 0;
        FaultIsGeneralDetect = false;
        SetActivity();
    }

    private bool IsEnabled(int i) => (_dr7 >> (i * 2) & 3) != 0;

    private int Kind(int i) => (int)(_dr7 >> (16 + i * 4) & 3);

    private int Length(int i) => (_dr7 >> (18 + i * 4) & 3) switch
    {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };

    /// <summary>A breakpoint covers the aligned unit around its address.</summary>
    private bool Overlaps(int i, ulong start, int size)
    {
        ulong length = (ulong)Length(i);
        ulong first = _addresses[i] & ~(length - 1);
        return start < first + length && first < start + (ulong)size;
    }

    /// <summary>After a change of DR7 or CR4.DE.</summary>
    internal void SetActivity()
    {
        IsActive = (_dr7 & EnableBits) != 0;
        HasDataBreakpoints = false;
        HasPortBreakpoints = false;
        for (int i = 0; i < 4; i++)
        {
            if (!IsEnabled(i))
                continue;
            HasPortBreakpoints |= Kind(i) == OnPort && (_s->Cr4 & (ulong)Cr4.DE) != 0;
            HasDataBreakpoints |= Kind(i) is not (OnExecution or OnPort);
        }
    }

    private void Update()
    {
        SetActivity();
        _vcpu.Mmu.UpdateRights();
    }
}
