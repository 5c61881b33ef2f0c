using System;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// The memory controller hub of a Q35 board (Intel 3 Series Express Chipset Family datasheet, 316966, ch. 5 "Host Bridge Registers"): function 00.0 with
/// PCIEXBAR, configuration access by ports CF8h and CFCh and by memory, and all that lies behind: root bus and its address spaces.
/// </summary>
/// <remarks>
/// PAM and SMRAM registers keep what is written; RAM shadowing is always on. The subsystem's identity is the one by which SeaBIOS and OVMF know a virtual board with fw_cfg
/// from a real one.
/// </remarks>
public sealed class Q35HostBridge : PciFunction, IMmioDevice, IPortFallback
{
    private const ushort AddressPort = 0xcf8;
    private const ushort DataPort = 0xcfc;
    private const uint AddressEnable = 1u << 31;

    private enum Register
    {
        EpBar = 0x40,
        McBar = 0x48,
        PcieXBar = 0x60,
        DmiBar = 0x68,
        Pam0 = 0x90,
        Smram = 0x9d,
        EsmramControl = 0x9e,
        TopOfMemory = 0xa0,
        TopOfUpperMemory = 0xa2,
        TopOfLowMemory = 0xb0,
    }

    // Wiring
    private readonly PciSpace _space = new();
    private readonly ulong _memoryStart;

    // State
    private volatile uint _address;
    private ulong _ecamBase;
    private ulong _ecamSize;

    /// <param name="msi">Where message-signalled interrupts go.</param>
    /// <param name="setPin">Drives INTA (0) to INTD (3) of a device on bus 0.</param>
    /// <param name="memoryStart">Where RAM below 4 GiB ends: what is not RAM from there on is behind the bridge.</param>
    public Q35HostBridge(IMsiSink msi, Action<int, int, bool> setPin, ulong memoryStart)
        : base("mch", new PciIdentity(0x8086, 0x29c0, PciClass.HostBridge, Revision: 2, 0x1af4, 0x1100))
    {
        _memoryStart = memoryStart;
        Writable32((int)Register.EpBar, 0xffff_f001);
        Writable32((int)Register.EpBar + 4, 0xf);
        Writable32((int)Register.McBar, 0xffff_c001);
        Writable32((int)Register.McBar + 4, 0xf);
        Writable32((int)Register.PcieXBar, 0xf000_0007);
        Writable32((int)Register.PcieXBar + 4, 0xf);
        Writable32((int)Register.DmiBar, 0xffff_f001);
        Writable32((int)Register.DmiBar + 4, 0xf);
        for (int pam = 0; pam < 7; pam++)
            Writable16((int)Register.Pam0 + pam, 0x33);
        Writable16((int)Register.Smram, 0x0058);
        Writable16((int)Register.EsmramControl, 0x0087);
        Writable32((int)Register.TopOfMemory, 0xffff_ffff);
        Writable16((int)Register.TopOfLowMemory, 0xfff0);
        RootBus = new PciBus(msi, setPin, _space.Update);
        RootBus.Plug(this, new PciSlot(0));
        _space.Connect(RootBus);
    }

    public PciBus RootBus { get; }

    /// <summary>Has doorbells of what is behind the bridge go to an accelerator.</summary>
    public void Connect(IDoorbellTaker taker) => _space.Connect(taker);

    /// <summary>Claims the memory behind the bridge and becomes the one who is asked for ports without a device.</summary>
    /// <param name="lowEnd">One past the last byte of the 32-bit window.</param>
    public void Map(PortBus ports, MmioBus memory, ulong lowEnd, ulong highStart, ulong highSize)
    {
        ports.Fallback = this;
        memory.Map(new Gpa(_memoryStart), lowEnd - _memoryStart, new Window(this, _memoryStart));
        if (highSize > 0)
            memory.Map(new Gpa(highStart), highSize, new Window(this, highStart));
    }

    /// <summary>Does what firmware does with PCIEXBAR, for a system that is started without one.</summary>
    public void EnableEcam(ulong address)
    {
        Store((int)Register.PcieXBar, 4, (uint)address | 1);
        Store((int)Register.PcieXBar + 4, 4, (uint)(address >> 32));
        ReadPcieXBar();
    }

    public override void Reset()
    {
        base.Reset();
        _address = 0;
        ReadPcieXBar();
    }

    /// <summary>A read at a guest-physical address behind the bridge.</summary>
    public ulong Read(ulong address, AccessSize size)
    {
        if (address - _ecamBase < _ecamSize)
            return ReadEcam(address - _ecamBase, size);
        return _space.TryReadMemory(address, size, out ulong value) ? value : ulong.MaxValue;
    }

    /// <summary>A write at a guest-physical address behind the bridge.</summary>
    public void Write(ulong address, AccessSize size, ulong value)
    {
        if (address - _ecamBase < _ecamSize)
            WriteEcam(address - _ecamBase, size, value);
        else
            _space.WriteMemory(address, size, value);
    }

    public bool TryReadPort(ushort port, AccessSize size, out uint value)
    {
        // Only whole double words reach the address register; bytes there are other ports (CF9h).
        if (port == AddressPort && size == AccessSize.Dword)
        {
            value = _address;
            return true;
        }
        if (IsData(port, size))
        {
            uint address = _address;
            PciFunction? function = (address & AddressEnable) == 0 ? null : Route((int)(address >> 16 & 0xff), (int)(address >> 8 & 0xff));
            value = function?.ReadConfig((int)(address & 0xfc) | port & 3, size) ?? uint.MaxValue;
            return true;
        }
        return _space.TryReadPort(port, size, out value);
    }

    public bool TryWritePort(ushort port, AccessSize size, uint value)
    {
        if (port == AddressPort && size == AccessSize.Dword)
        {
            _address = value & ~3u;
            return true;
        }
        if (IsData(port, size))
        {
            uint address = _address;
            if ((address & AddressEnable) != 0)
                Route((int)(address >> 16 & 0xff), (int)(address >> 8 & 0xff))?.WriteConfig((int)(address & 0xfc) | port & 3, size, value);
            return true;
        }
        return _space.TryWritePort(port, size, value);
    }

    protected override void WrittenConfig(int offset, int bytes)
    {
        if (offset < (int)Register.PcieXBar + 8 && offset + bytes > (int)Register.PcieXBar)
            ReadPcieXBar();
    }

    private static bool IsData(ushort port, AccessSize size) => port is >= DataPort and < DataPort + 4 && (port & 3) + (int)size <= 4;

    private PciFunction? Route(int bus, int devfn) => RootBus.Route(0, bus, devfn);

    private void ReadPcieXBar()
    {
        ulong value = Load((int)Register.PcieXBar, 4) | (ulong)Load((int)Register.PcieXBar + 4, 4) << 32;
        ulong size = (value >> 1 & 3) switch { 0 => 256ul << 20, 1 => 128ul << 20, 2 => 64ul << 20, _ => 0 };
        _ecamSize = 0;
        _ecamBase = size == 0 ? 0 : value & ~(size - 1) & 0xf_ffff_ffff;
        _ecamSize = (value & 1) != 0 ? size : 0;
    }

    private ulong ReadEcam(ulong offset, AccessSize size)
    {
        if (size == AccessSize.Qword)
            return ReadEcam(offset, AccessSize.Dword) | ReadEcam(offset + 4, AccessSize.Dword) << 32;
        int register = (int)(offset & 0xfff);
        if (register + (int)size > ExpressSize)
            return ulong.MaxValue;
        return Route((int)(offset >> 20), (int)(offset >> 12 & 0xff))?.ReadConfig(register, size) ?? ulong.MaxValue;
    }

    private void WriteEcam(ulong offset, AccessSize size, ulong value)
    {
        if (size == AccessSize.Qword)
        {
            WriteEcam(offset, AccessSize.Dword, (uint)value);
            WriteEcam(offset + 4, AccessSize.Dword, value >> 32);
            return;
        }
        int register = (int)(offset & 0xfff);
        if (register + (int)size <= ExpressSize)
            Route((int)(offset >> 20), (int)(offset >> 12 & 0xff))?.WriteConfig(register, size, (uint)value);
    }

    /// <summary>A part of the guest-physical address space, with addresses put back to what the guest used.</summary>
    private sealed class Window(Q35HostBridge bridge, ulong start) : IMmioDevice
    {
        public ulong Read(ulong offset, AccessSize size) => bridge.Read(start + offset, size);

        public void Write(ulong offset, AccessSize size, ulong value) => bridge.Write(start + offset, size, value);
    }
}
