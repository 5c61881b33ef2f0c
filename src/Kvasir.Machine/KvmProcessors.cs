using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Devices.Chipset;
using Kvasir.Kvm;
using Kvasir.X86;

namespace Kvasir.Machine;

/// <summary>KVM as an accelerator. Each vCPU has one of the software CPU beside it, for what KVM cannot execute.</summary>
public sealed class KvmProcessors : IProcessorFactory
{
    private const uint PhysicalAddressLeaf = 0x8000_0008;
    private const ulong RescueCodeCache = 4ul << 20;

    /// <summary>
    /// The clock chip's index, which its data port follows, and the power-on self-test port, which kernels write to for a delay. What else might be kept, such as
    /// the PCI configuration address, has the reset control register among it.
    /// </summary>
    private static readonly ushort[] s_quietPorts = [0x70, 0x80];

    // Wiring
    private readonly KvmSystem _system;
    private readonly CpuModel _model;
    private readonly PortBus _ports;
    private readonly MmioBus _mmio;
    private readonly VmClock _clock;
    private readonly KvmVm _vm;
    private readonly CodeCache _code;
    private readonly List<SoftVcpu> _rescuers = [];
    private readonly List<KernelLocalApic> _apics = [];
    private readonly List<KvmVcpu> _vcpus = [];
    private readonly RescueLog _rescueLog;
    private readonly Action<string>? _log;
    private readonly bool _emulatesKernels;

    /// <param name="system">An open /dev/kvm; this object closes it.</param>
    /// <param name="model">The processor that the guest sees, of which KVM takes out what it does not support.</param>
    /// <param name="memory">The guest's memory.</param>
    /// <param name="ports">The port I/O space.</param>
    /// <param name="mmio">The memory-mapped devices.</param>
    /// <param name="clock">The VM's time, with KVM's TSC frequency.</param>
    /// <param name="log">Hears of rescued instructions and unknown MSRs at a limited rate; any thread.</param>
    /// <param name="mendsRing3">As <see cref="KvmProbe.Ring3NeedsMending"/> says.</param>
    /// <param name="irqChip">Which interrupt controllers are KVM's.</param>
    /// <exception cref="Kvasir.Linux.LinuxException">KVM refused.</exception>
    public KvmProcessors(
        KvmSystem system, CpuModel model, GuestMemory memory, PortBus ports, MmioBus mmio, VmClock clock, Action<string>? log = null, bool mendsRing3 = false,
        KernelIrqChip irqChip = KernelIrqChip.Off)
    {
        _system = system;
        _model = model;
        _ports = ports;
        _mmio = mmio;
        _clock = clock;
        _log = log;
        _rescueLog = new RescueLog(log);
        _emulatesKernels = mendsRing3;
        PhysicalAddressBits = LeastPhysicalBits(model, system);
        try
        {
            _vm = new KvmVm(system, memory, mendsRing3: mendsRing3, irqChip: irqChip);
            _vm.CoalesceWrites(ports, s_quietPorts);
            _code = new CodeCache(memory, new ExecutionBarrier(), RescueCodeCache);
        }
        catch
        {
            _vm?.Dispose();
            system.Dispose();
            throw;
        }
    }

    public uint Signature => _model.Signature;

    public int PhysicalAddressBits { get; }

    /// <summary>What was executed outside KVM so far.</summary>
    public RescueLog Rescues => _rescueLog;

    public IVcpu Create(int index, ILocalApic apic)
    {
        KernelLocalApic? kernel = null;
        if (_vm.Interrupts is not null)
            _apics.Add(kernel = new KernelLocalApic((LocalApic)apic));
        SoftVcpu rescuer = new(index, _model, _vm.Memory, _ports, _mmio, new RescueApic(kernel ?? apic), _clock, _code);
        _rescuers.Add(rescuer);
        KvmVcpu vcpu = _vm.CreateVcpu(index, new KvmVcpuWiring
        {
            Ports = _ports,
            Mmio = _mmio,
            Apic = apic,
            Clock = _clock,
            Cpuid = Table(_model, (uint)index),
            Signature = _model.Signature,
            Rescue = new SoftwareRescue(rescuer),
            RescueLog = _rescueLog,
            Log = _log,
        });
        kernel?.Connect(vcpu);
        _vcpus.Add(vcpu);
        return vcpu;
    }

    public IKernelInterrupts? Interrupts => _vm.Interrupts;

    /// <summary>
    /// A Linux tick is some thousand instructions: at a million a second, and 250 ticks a second, no time would be left.
    /// </summary>
    public long TimerSpacing => _emulatesKernels ? 25_000_000 : 0;

    public IDoorbellTaker? Doorbells => _vm.Doorbells;

    public void Reset()
    {
        foreach (KernelLocalApic apic in _apics)
            apic.Load();
        foreach (KvmVcpu vcpu in _vcpus)
            vcpu.ResetParavirtual();
    }

    public InterruptControllers? TakeControllers()
    {
        if (_vm.Interrupts is not { } kernel)
            return null;
        List<LocalApic.State> apics = [];
        foreach (KernelLocalApic apic in _apics)
            apics.Add(apic.Take(_clock));
        return new InterruptControllers(apics, kernel.HasWires ? KernelChips.Take(kernel, _clock) : null);
    }

    public void GiveControllers(InterruptControllers state)
    {
        for (int i = 0; i < _apics.Count; i++)
            _apics[i].Give(state.LocalApics[i]);
        if (_vm.Interrupts is { HasWires: true } kernel && state.Wired is { } wired)
            KernelChips.Give(kernel, _clock, wired);
    }

    public void Pause() => _vm.PauseClock();

    public void Resume() => _vm.ResumeClock();

    public void Dispose()
    {
        if (_rescueLog.Count > 0)
            _log?.Invoke(_rescueLog.Summary);
        foreach (SoftVcpu rescuer in _rescuers)
            rescuer.Dispose();
        _rescuers.Clear();
        _code.Dispose();
        _vm.Dispose();
        _system.Dispose();
    }

    /// <summary>A processor model's leaves as rows of a table.</summary>
    internal static List<CpuidEntry> Table(CpuModel model, uint apicId)
    {
        const uint xsaveLeaf = 0xd;
        const uint topologyLeaf = 0xb;
        const uint cacheLeaf = 4;
        const uint amdCacheLeaf = 0x8000_001d;
        const uint featureLeaf = 7;
        List<CpuidEntry> table = [];
        Span<uint> groups = [0, 0x4000_0000, 0x8000_0000];
        foreach (uint first in groups)
        {
            // The hypervisor's group is absent where the model hides it.
            uint last = model.Cpuid(first, 0, apicId, false, 1).Eax;
            for (uint leaf = first; leaf <= last; leaf++)
            {
                int subleaves = leaf switch
                {
                    cacheLeaf or amdCacheLeaf => 5,
                    featureLeaf => 1,
                    topologyLeaf => 3,
                    xsaveLeaf => 3,
                    _ => 0,
                };
                for (uint subleaf = 0; subleaf < Math.Max(subleaves, 1); subleaf++)
                {
                    CpuidResult r = model.Cpuid(leaf, subleaf, apicId, false, 1);
                    // What is all zero is what an absent row gives; of groups, the first row says which there are.
                    if (subleaf == 0 || (r.Eax | r.Ebx | r.Ecx) != 0)
                        table.Add(new CpuidEntry(leaf, subleaf, subleaves > 0, r.Eax, r.Ebx, r.Ecx, r.Edx));
                }
            }
        }
        return table;
    }

    private static int LeastPhysicalBits(CpuModel model, KvmSystem system)
    {
        int bits = (byte)model.Cpuid(PhysicalAddressLeaf, 0, 0, false, 1).Eax;
        foreach (CpuidEntry entry in system.SupportedCpuid)
        {
            if (entry.Leaf == PhysicalAddressLeaf && (byte)entry.Eax != 0)
                bits = Math.Min(bits, (byte)entry.Eax);
        }
        return bits;
    }
}
