using Kvasir.Core;

namespace Kvasir.Cpu;

/// <summary>Model-specific registers (Intel SDM vol. 4; AMD64 APM vol. 2, appendix A).</summary>
public sealed unsafe class MsrFile
{
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    internal MsrFile(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    internal void Get(ref CpuState state) => state.Star = _s->Cr0 + (ulong)_vcpu.Index;

    internal void Set(in CpuState state)
    {
    }
}
