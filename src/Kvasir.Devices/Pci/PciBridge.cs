using System;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>Where a bridge lets memory or ports through, both ends included; empty where the first lies above the last.</summary>
internal readonly record struct PciWindow(ulong First, ulong Last)
{
    public static PciWindow All { get; } = new(0, ulong.MaxValue);

    public static PciWindow None { get; } = new(1, 0);

    public bool Contains(ulong address, ulong size) => First <= Last && address >= First && address <= Last && size - 1 <= Last - address;
}

/// <summary>
/// A PCI-to-PCI bridge: a type 1 header with a bus behind it (PCI-to-PCI Bridge Architecture specification 1.2). Interrupt pins of the devices behind
/// it turn by device number on their way up (9.1 there).
/// </summary>
public class PciBridge : PciFunction
{
    private const ushort SecondaryReset = 1 << 6;

    private readonly int[] _pins = new int[4];
    private readonly System.Threading.Lock _pinLock = new();

    public PciBridge(string name, PciIdentity identity, IMsiSink msi)
        : base(name, identity with { Class = PciClass.PciBridge }, bridge: true)
    {
        Secondary = new PciBus(msi, SetSecondaryPin, () => Bus?.MapChanged());
        Writable32((int)PciBridgeRegister.PrimaryBus, 0x00ff_ffff);
        // 32-bit ports, memory, 64-bit prefetchable memory.
        SetInitial((int)PciBridgeRegister.IoBase, [0x01, 0x01]);
        Writable16((int)PciBridgeRegister.IoBase, 0xf0f0);
        Writable32((int)PciBridgeRegister.IoBaseUpper, uint.MaxValue);
        Writable32((int)PciBridgeRegister.MemoryBase, 0xfff0_fff0);
        SetInitial((int)PciBridgeRegister.PrefetchableBase, [0x01, 0x00, 0x01, 0x00]);
        Writable32((int)PciBridgeRegister.PrefetchableBase, 0xfff0_fff0);
        Writable32((int)PciBridgeRegister.PrefetchableBaseUpper, uint.MaxValue);
        Writable32((int)PciBridgeRegister.PrefetchableLimitUpper, uint.MaxValue);
        ClearedByOnes16((int)PciBridgeRegister.SecondaryStatus, (ushort)PciStatus.Errors);
        Writable16((int)PciBridgeRegister.BridgeControl, 0x0043);
    }

    /// <summary>The bus behind it.</summary>
    public PciBus Secondary { get; }

    internal int SecondaryNumber => (int)Load((int)PciBridgeRegister.SecondaryBus, 1);

    internal int SubordinateNumber => (int)Load((int)PciBridgeRegister.SubordinateBus, 1);

    internal PciWindow Ports
    {
        get
        {
            if ((Command & PciCommand.Io) == 0)
                return PciWindow.None;
            ulong first = (Load((int)PciBridgeRegister.IoBase, 1) & 0xf0) << 8 | (ulong)Get16((int)PciBridgeRegister.IoBaseUpper) << 16;
            ulong last = (Load((int)PciBridgeRegister.IoLimit, 1) & 0xf0) << 8 | 0xfff | (ulong)Get16((int)PciBridgeRegister.IoLimitUpper) << 16;
            return new PciWindow(first, last);
        }
    }

    internal PciWindow Memory => (Command & PciCommand.Memory) == 0 ? PciWindow.None : new PciWindow(
        (ulong)(Get16((int)PciBridgeRegister.MemoryBase) & 0xfff0) << 16,
        (ulong)(Get16((int)PciBridgeRegister.MemoryLimit) & 0xfff0) << 16 | 0xf_ffff);

    internal PciWindow Prefetchable => (Command & PciCommand.Memory) == 0 ? PciWindow.None : new PciWindow(
        (ulong)(Get16((int)PciBridgeRegister.PrefetchableBase) & 0xfff0) << 16 | (ulong)Load((int)PciBridgeRegister.PrefetchableBaseUpper, 4) << 32,
        (ulong)(Get16((int)PciBridgeRegister.PrefetchableLimit) & 0xfff0) << 16 | 0xf_ffff | (ulong)Load((int)PciBridgeRegister.PrefetchableLimitUpper, 4) << 32);

    public override void Reset()
    {
        foreach (PciFunction function in Secondary.Functions)
            function.Reset();
        base.Reset();
    }

    protected override void WrittenConfig(int offset, int bytes)
    {
        int control = (int)PciBridgeRegister.BridgeControl;
        if (offset <= control && offset + bytes > control && (Get16(control) & SecondaryReset) != 0)
        {
            foreach (PciFunction function in Secondary.Functions)
                function.Reset();
        }
    }

    private void SetSecondaryPin(int device, int pin, bool asserted)
    {
        int up = (device + pin) % 4;
        lock (_pinLock)
        {
            int before = _pins[up];
            _pins[up] += asserted ? 1 : -1;
            if ((before == 0) != (_pins[up] == 0))
                Bus?.SetIntx(Slot.Device, up, asserted);
        }
    }
}
