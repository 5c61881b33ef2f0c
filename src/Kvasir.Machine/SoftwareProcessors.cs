using System;
using Kvasir.Core;
using Kvasir.Cpu;

namespace Kvasir.Machine;

/// <summary>The software CPU as an accelerator: all vCPUs of a VM share one cache of decoded code.</summary>
public sealed class SoftwareProcessors : IProcessorFactory
{
    private const uint PhysicalAddressLeaf = 0x8000_0008;

    private readonly CpuModel _model;
    private readonly GuestMemory _memory;
    private readonly PortBus _ports;
    private readonly MmioBus _mmio;
    private readonly VmClock _clock;
    private readonly CodeCache _code;
    private readonly Action<string>? _log;

    public SoftwareProcessors(CpuModel model, GuestMemory memory, PortBus ports, MmioBus mmio, VmClock clock, Action<string>? log = null)
    {
        _log = log;
        _model = model;
        _memory = memory;
        _ports = ports;
        _mmio = mmio;
        _clock = clock;
        _code = new CodeCache(memory, new ExecutionBarrier());
    }

    public uint Signature => _model.Signature;

    public int PhysicalAddressBits => (byte)_model.Cpuid(PhysicalAddressLeaf, 0, 0, false, 1).Eax;

    public IVcpu Create(int index, ILocalApic apic)
    {
        SoftVcpu vcpu = new(index, _model, _memory, _ports, _mmio, apic, _clock, _code);
        vcpu.Msrs.Log = _log;
        return vcpu;
    }

    public void Dispose() => _code.Dispose();
}
