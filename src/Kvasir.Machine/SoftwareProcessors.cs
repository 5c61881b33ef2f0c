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
    private readonly AcceleratorLogs _logs;

    /// <summary>Address space for translated code; memory is used as code is made.</summary>
    private const ulong TranslationCapacity = 256ul << 20;

    public SoftwareProcessors(CpuModel model, GuestMemory memory, PortBus ports, MmioBus mmio, VmClock clock, ExecutionEngine engine, AcceleratorLogs logs)
    {
        _logs = logs;
        _model = model;
        _memory = memory;
        _ports = ports;
        _mmio = mmio;
        _clock = clock;
        _code = new CodeCache(memory, new ExecutionBarrier(), translations: engine == ExecutionEngine.Interpreter ? 0 : TranslationCapacity, lockStep: engine == ExecutionEngine.LockStep);
        if (_code.Translator is { } translator)
            translator.Log = logs.Translator;
    }

    public uint Signature => _model.Signature;

    public int PhysicalAddressBits => (byte)_model.Cpuid(PhysicalAddressLeaf, 0, 0, false, 1).Eax;

    public IVcpu Create(int index, ILocalApic apic)
    {
        SoftVcpu vcpu = new(index, _model, _memory, _ports, _mmio, apic, _clock, _code);
        vcpu.Msrs.Log = _logs.Cpu;
        return vcpu;
    }

    public void Dispose()
    {
        if (_code.Translator is { } translator)
            _logs.Translator?.Invoke(translator.Report());
        _code.Dispose();
    }
}
