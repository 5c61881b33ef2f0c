using System;
using System.Collections.Generic;
using Kvasir.Boot;
using Kvasir.Boot.Firmware;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Firmware;
using Kvasir.Devices.Pci;

namespace Kvasir.Machine.Boards;

/// <summary>
/// What every board begins with: memory, buses, time, interrupt controllers and processors. A board's own list adds its devices to it. The frame knows
/// only that they can be reset and freed.
/// </summary>
internal sealed class BoardFrame : IBoard
{
    // Configuration
    private readonly GuestSoftware _software;

    // Wiring
    private readonly List<IResettable> _resettable = [];
    private readonly List<IPausable> _pausable = [];
    private readonly List<IDisposable> _owned = [];
    private readonly OrGate?[] _sharedPins = new OrGate?[IoApic.PinCount];
    private readonly List<LocalApic> _localApics = [];
    private readonly List<IVcpu> _vcpus = [];
    private IProcessorFactory? _processors;
    private Func<bool>? _powerButton;

    /// <summary>Makes memory, buses and interrupt controllers; the processors come with <see cref="Finish"/>.</summary>
    public BoardFrame(VmConfiguration configuration, ulong tscFrequency)
    {
        _software = new GuestSoftware(configuration);
        Memory = new GuestMemory(configuration.Memory);
        Clock = new VmClock(tscFrequency: tscFrequency);
        Apics = new ApicBus();
        Pic = Add(new Pic8259(Apics.Lint0));
        Pic.Map(Ports);
        Apics.ConnectExternal(Pic);
        IoApic = Add(new IoApic(Apics));
        Mmio.Map(new Gpa(ChipsetAddresses.IoApic), IoApic.RegionSize, IoApic, AccessSize.Dword, AccessSize.Dword);
        Irqs = new IsaIrqs(Pic, IoApic);
    }

    public GuestMemory Memory { get; }

    public PortBus Ports { get; } = new();

    public MmioBus Mmio { get; } = new();

    public VmClock Clock { get; }

    public ApicBus Apics { get; }

    public Pic8259 Pic { get; }

    public IoApic IoApic { get; }

    public IsaIrqs Irqs { get; }

    public IReadOnlyList<IVcpu> Vcpus => _vcpus;

    /// <summary>The clock chip, whose memory tells firmware of the machine; null on a board without one.</summary>
    public CmosRtc? Rtc { get; set; }

    /// <summary>Null on a board without one.</summary>
    public FwCfg? FwCfg { get; set; }

    /// <summary>What firmware tables say of the board. Set by the board's list.</summary>
    public BoardDescription? Description { get; private set; }

    /// <summary>Where virtio devices go on this board; null: it has no place for any.</summary>
    public IVirtioPlaces? Virtio { get; set; }

    /// <summary>Slots that devices are plugged into while the VM runs.</summary>
    public List<PcieRootPort> RootPorts { get; } = [];

    public BoardDevices? Devices { get; set; }

    IDeviceControl? IBoard.Devices => Devices;

    /// <summary><see cref="Virtio"/>, for a device that needs it.</summary>
    /// <exception cref="MachineException">There is none.</exception>
    public IVirtioPlaces Places(string device) => Virtio ?? throw new MachineException($"this machine has no place for {device}");

    /// <summary>What firmware would have done to the board's own devices, for a system that is started without one.</summary>
    public Action? ActAsFirmware { get; set; }

    /// <summary>Hears of the accelerator that takes doorbells, once, where it does.</summary>
    public event Action<IDoorbellTaker>? DoorbellsTaken;

    /// <summary>Has a device reset with the board.</summary>
    public T Add<T>(T device)
        where T : IResettable
    {
        _resettable.Add(device);
        return device;
    }

    /// <summary>Has a device with threads of its own stand while the VM is paused.</summary>
    public void AddPausable(IPausable device)
    {
        lock (_pausable)
            _pausable.Add(device);
    }

    /// <summary>Takes a device out again.</summary>
    public void RemovePausable(IPausable device)
    {
        lock (_pausable)
            _pausable.Remove(device);
    }

    /// <summary>Has something freed with the board, before guest memory is; what was added last goes first.</summary>
    public T Own<T>(T part)
        where T : IDisposable
    {
        lock (_owned)
            _owned.Add(part);
        return part;
    }

    /// <summary>Frees a part that goes before the board does.</summary>
    public void Disown(IDisposable part)
    {
        lock (_owned)
            _owned.Remove(part);
        part.Dispose();
    }

    /// <summary>A further wire to an I/O APIC pin that several sources share.</summary>
    public IIrqLine SharedPin(int pin) => (_sharedPins[pin] ??= new OrGate(IoApic.Pin(pin))).AddInput();

    /// <summary>Makes the processors and puts the guest's ROM in place.</summary>
    public void Finish(ProcessorSource source, BoardDescription description, Func<bool> powerButton)
    {
        _powerButton = powerButton;
        _software.Install(Memory);
        _processors = source(Memory, Ports, Mmio, Clock);
        if (_processors.Interrupts is { } kernel)
        {
            Apics.Connect(kernel);
            if (kernel.HasWires)
                Pic.Connect(kernel);
        }
        if (_processors.Doorbells is { } taker)
        {
            Mmio.Connect(taker);
            DoorbellsTaken?.Invoke(taker);
        }
        Description = description with { PhysicalAddressBits = _processors.PhysicalAddressBits };
        LocalApicFeatures features = new(PhysicalAddressBits: _processors.PhysicalAddressBits, TimerSpacing: _processors.TimerSpacing);
        TellFirmware(Description);
        for (int index = 0; index < description.ApicIds.Count; index++)
        {
            LocalApic apic = new(description.ApicIds[index], bootProcessor: index == 0, Apics, Clock, features);
            _localApics.Add(apic);
            IVcpu vcpu = _processors.Create(index, apic);
            _vcpus.Add(vcpu);
            apic.Connect(vcpu);
        }
    }

    /// <summary>Fills what firmware reads of the machine. It outlives resets: firmware does not write there what it must find again.</summary>
    private void TellFirmware(BoardDescription description)
    {
        if (Rtc is not null)
        {
            foreach ((byte index, byte value) in CmosContent.Build(Memory, description))
                Rtc.SetMemory(index, value);
        }
        if (FwCfg is null)
            return;
        foreach (FwCfgItem item in FwCfgContent.Board(Memory, description, Devices?.BootOrder ?? []))
        {
            if (item.Key is { } key)
                FwCfg.AddItem((ushort)key, item.Content.ToArray());
            else
                FwCfg.AddFile(item.Name!, item.Content.ToArray());
        }
    }

    public void Reset()
    {
        _processors!.Interrupts?.Reset();
        foreach (LocalApic apic in _localApics)
            apic.Reset();
        foreach (IResettable device in _resettable)
            device.Reset();
        BoardDescription description = Description!;
        uint signature = _processors!.Signature;
        CpuState boot = _software.Load(Memory, description, signature);
        _vcpus[0].SetState(boot);
        CpuState waiting = CpuState.AtReset(signature);
        waiting.Activity = VcpuActivity.WaitForSipi;
        if (_software.SkipsFirmware)
        {
            // What firmware would have done on each processor before it started a system.
            EntryState.SetMemoryTypes(ref waiting, description.PhysicalAddressBits);
            foreach (LocalApic apic in _localApics)
                apic.ConfigureVirtualWire();
            ActAsFirmware?.Invoke();
        }
        _processors.Reset();
        for (int index = 1; index < _vcpus.Count; index++)
            _vcpus[index].SetState(waiting);
    }

    public void Pause()
    {
        _processors?.Pause();
        foreach (IPausable device in Pausable())
            device.Pause();
    }

    public void Resume()
    {
        foreach (IPausable device in Pausable())
            device.Resume();
        _processors?.Resume();
    }

    public bool PressPowerButton() => _powerButton?.Invoke() ?? false;

    public void Dispose()
    {
        // Timers first: their call-backs reach devices, and those reach processors and memory.
        Clock.Dispose();
        // What is under way in devices comes to its end while all is open that it works with, and nothing more begins.
        foreach (IPausable device in Pausable())
            device.Pause();
        // Then devices with threads of their own, which reach memory.
        for (int i = _owned.Count - 1; i >= 0; i--)
            _owned[i].Dispose();
        foreach (IVcpu vcpu in _vcpus)
            vcpu.Dispose();
        _processors?.Dispose();
        Memory.Dispose();
    }

    private IPausable[] Pausable()
    {
        lock (_pausable)
            return [.. _pausable];
    }
}
