using System;
using Kvasir.Core;

namespace Kvasir.Cpu;

/// <summary>x87, MMX, SSE and AVX state of a vCPU.</summary>
public sealed unsafe class VectorUnit : IDisposable
{
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    internal VectorUnit(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    public void Dispose()
    {
    }

    internal void Get(ref CpuState state) => state.Xsave[0] = _s->Cr0 + (ulong)_vcpu.Index;

    internal void Set(in CpuState state)
    {
    }
}
