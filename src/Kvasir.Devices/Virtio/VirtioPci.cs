using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Pci;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// Virtio over PCI (virtio 1.2, 4.1): the modern interface in a memory region, found through vendor capabilities, and for transitional devices the legacy
/// one in a region of ports.
/// </summary>
public sealed class VirtioPci : PciFunction, IVirtioTransport
{
    private const ushort RedHat = 0x1af4;
    private const ushort ModernBase = 0x1040;
    private const int PortBar = 0;
    private const int MsixBar = 1;
    private const int MemoryBar = 4;

    /// <summary>The parts of the memory region, a page each.</summary>
    private const int CommonOffset = 0x0000;
    private const int IsrOffset = 0x1000;
    private const int ConfigOffset = 0x2000;
    private const int NotifyOffset = 0x3000;
    private const int PartSize = 0x1000;
    private const int MemorySize = 0x4000;
    private const int NotifyMultiplier = 4;
    private const int LegacySize = 64;

    /// <summary>Pages of legacy queue addresses, and the alignment of a legacy used ring, in bytes.</summary>
    private const ulong LegacyPage = 4096;

    private enum CapabilityType : byte
    {
        Common = 1,
        Notify = 2,
        Isr = 3,
        Device = 4,
        PciConfig = 5,
    }

    /// <summary>The common configuration structure (4.1.4.3).</summary>
    private enum Common
    {
        DeviceFeatureSelect = 0x00,
        DeviceFeature = 0x04,
        DriverFeatureSelect = 0x08,
        DriverFeature = 0x0c,
        ConfigVector = 0x10,
        QueueCount = 0x12,
        Status = 0x14,
        Generation = 0x15,
        QueueSelect = 0x16,
        QueueSize = 0x18,
        QueueVector = 0x1a,
        QueueEnable = 0x1c,
        QueueNotifyOffset = 0x1e,
        QueueDescriptors = 0x20,
        QueueDriver = 0x28,
        QueueDevice = 0x30,
        QueueNotifyData = 0x38,
    }

    /// <summary>The legacy interface (4.1.4.10).</summary>
    private enum Legacy
    {
        DeviceFeatures = 0x00,
        DriverFeatures = 0x04,
        QueueAddress = 0x08,
        QueueSize = 0x0c,
        QueueSelect = 0x0e,
        QueueNotify = 0x10,
        Status = 0x12,
        Isr = 0x13,
        ConfigVector = 0x14,
        QueueVector = 0x16,
    }

    /// <summary>What the transport itself holds, beside the function's and the device's state.</summary>
    public readonly record struct TransportState(uint DeviceFeatureSelect, uint DriverFeatureSelect, ushort QueueSelect, ushort ConfigVector, byte Isr);

    // Configuration
    private readonly int _windowCapability;

    // Wiring
    private readonly VirtioDevice _device;
    private readonly Msix _msix;

    // State
    private readonly Lock _lock = new();
    private uint _deviceFeatureSelect;
    private uint _driverFeatureSelect;
    private ushort _queueSelect;
    private ushort _configVector = Msix.NoVector;
    private byte _isr;

    /// <param name="device">The device; its transport is this from now on.</param>
    /// <param name="transitional">It also has the legacy interface. Only types with a number of before virtio 1.0 can.</param>
    /// <param name="express">It sits behind a root port.</param>
    public VirtioPci(VirtioDevice device, bool transitional = false, bool express = false)
        : base(device.Name, IdentityOf(device, transitional))
    {
        _device = device;
        UsePin(1);
        if (express)
            PcieCapability.AddEndpoint(this);
        int vectors = Math.Min(device.Queues.Length + 1, Msix.MaximumVectors);
        _msix = AddMsix(MsixBar, vectors);
        // Below 4 GiB: a 32-bit Linux with PAE cuts what it maps of a device to 32 bits (docs/decisions/0054).
        AddMemoryBar(MemoryBar, PciBarKind.Memory32, MemorySize, new MemoryRegion(this));
        if (transitional)
            AddPortBar(PortBar, LegacySize, new LegacyRegion(this));
        AddStructure(CapabilityType.Common, CommonOffset, PartSize, []);
        AddStructure(CapabilityType.Isr, IsrOffset, PartSize, []);
        AddStructure(CapabilityType.Device, ConfigOffset, PartSize, []);
        AddStructure(CapabilityType.Notify, NotifyOffset, PartSize, [NotifyMultiplier, 0, 0, 0]);
        _windowCapability = AddStructure(CapabilityType.PciConfig, 0, 0, [0, 0, 0, 0]);
        Writable32(_windowCapability + 4, 0xff);
        Writable32(_windowCapability + 8, uint.MaxValue);
        Writable32(_windowCapability + 12, uint.MaxValue);
        device.Connect(this);
    }

    public VirtioDevice Device => _device;

    public void InterruptQueue(Virtqueue queue) => Interrupt(queue.Setup.Vector, 1);

    public void InterruptConfig() => Interrupt(Volatile.Read(ref _configVector), 3);

    public void DeviceReset()
    {
        lock (_lock)
        {
            _deviceFeatureSelect = 0;
            _driverFeatureSelect = 0;
            _queueSelect = 0;
            _configVector = Msix.NoVector;
            _isr = 0;
        }
        SetIntx(false);
    }

    public override void Reset()
    {
        _device.Reset();
        base.Reset();
    }

    public TransportState SaveTransport()
    {
        lock (_lock)
            return new TransportState(_deviceFeatureSelect, _driverFeatureSelect, _queueSelect, _configVector, _isr);
    }

    /// <summary>Before the device's own state, whose queues may work at once.</summary>
    public void RestoreTransport(in TransportState state)
    {
        lock (_lock)
        {
            _deviceFeatureSelect = state.DeviceFeatureSelect;
            _driverFeatureSelect = state.DriverFeatureSelect;
            _queueSelect = state.QueueSelect;
            _configVector = state.ConfigVector;
            _isr = state.Isr;
            SetIntx(_isr != 0);
        }
    }

    protected override uint? ReadingConfig(int offset, AccessSize size) =>
        TryWindow(offset, out int inBar, out AccessSize width) ? (uint)ReadMemory(inBar, width) : null;

    protected override bool WritingConfig(int offset, AccessSize size, uint value)
    {
        if (!TryWindow(offset, out int inBar, out AccessSize width))
            return false;
        WriteMemory(inBar, width, value);
        return true;
    }

    private static PciIdentity IdentityOf(VirtioDevice device, bool transitional)
    {
        uint type = device.Type switch
        {
            VirtioType.Net => PciClass.Ethernet,
            VirtioType.Block or VirtioType.Scsi => PciClass.Scsi,
            VirtioType.Console => PciClass.OtherCommunication,
            VirtioType.Gpu => PciClass.OtherDisplay,
            VirtioType.FileSystem or VirtioType.Transport9P => PciClass.OtherStorage,
            _ => PciClass.Unclassified,
        };
        if (!transitional)
            return new PciIdentity(RedHat, (ushort)(ModernBase + (ushort)device.Type), type, Revision: 1, RedHat, (ushort)(0x40 + (ushort)device.Type));
        ushort number = device.Type switch
        {
            VirtioType.Net => 0x1000,
            VirtioType.Block => 0x1001,
            VirtioType.Balloon => 0x1002,
            VirtioType.Console => 0x1003,
            VirtioType.Scsi => 0x1004,
            VirtioType.Rng => 0x1005,
            VirtioType.Transport9P => 0x1009,
            _ => throw new ArgumentException($"there is no legacy {device.Type} device", nameof(transitional)),
        };
        return new PciIdentity(RedHat, number, type, Revision: 0, RedHat, (ushort)device.Type);
    }

    private int AddStructure(CapabilityType type, int offset, int length, ReadOnlySpan<byte> more)
    {
        byte[] body = new byte[14 + more.Length];
        body[0] = (byte)(body.Length + 2);
        body[1] = (byte)type;
        body[2] = MemoryBar;
        BinaryPrimitives.WriteInt32LittleEndian(body.AsSpan(6), offset);
        BinaryPrimitives.WriteInt32LittleEndian(body.AsSpan(10), length);
        more.CopyTo(body.AsSpan(14));
        return AddCapability(PciCapabilityId.Vendor, body);
    }

    /// <summary>The capability through which a driver without memory access reaches the region (4.1.4.9).</summary>
    private bool TryWindow(int offset, out int inBar, out AccessSize width)
    {
        inBar = 0;
        width = AccessSize.Dword;
        if (_windowCapability == 0 || offset != _windowCapability + 16)
            return false;
        uint bar = Load(_windowCapability + 4, 1);
        uint at = Load(_windowCapability + 8, 4);
        uint length = Load(_windowCapability + 12, 4);
        if (bar != MemoryBar || length is not (1 or 2 or 4) || at % length != 0 || at > MemorySize - length)
            return false;
        inBar = (int)at;
        width = (AccessSize)length;
        return true;
    }

    /// <summary>Interrupts by a vector, or by the pin.</summary>
    private void Interrupt(ushort vector, byte reason)
    {
        if (_msix.Enabled)
        {
            _msix.Send(vector);
            return;
        }
        lock (_lock)
        {
            _isr |= reason;
            SetIntx(true);
        }
    }

    private byte TakeIsr()
    {
        lock (_lock)
        {
            byte isr = _isr;
            _isr = 0;
            SetIntx(false);
            return isr;
        }
    }

    private Virtqueue? Selected => _queueSelect < _device.Queues.Length ? _device.Queues[_queueSelect] : null;

    private ulong ReadMemory(int offset, AccessSize size)
    {
        switch (offset & ~(PartSize - 1))
        {
            case CommonOffset:
                return ReadCommon(offset, size);
            case IsrOffset:
                return offset == IsrOffset ? TakeIsr() : 0u;
            case ConfigOffset:
                return _device.ReadConfig(offset - ConfigOffset, size);
            default:
                return 0;
        }
    }

    private void WriteMemory(int offset, AccessSize size, ulong value)
    {
        switch (offset & ~(PartSize - 1))
        {
            case CommonOffset:
                WriteCommon(offset, size, (uint)value);
                break;
            case ConfigOffset:
                _device.WriteConfig(offset - ConfigOffset, size, (uint)value);
                break;
            case NotifyOffset:
                _device.Kick((offset - NotifyOffset) / NotifyMultiplier);
                break;
            default:
                break;
        }
    }

    private uint ReadCommon(int offset, AccessSize size)
    {
        VirtqueueState queue = Selected?.Setup ?? default;
        switch ((Common)offset)
        {
            case Common.DeviceFeatureSelect:
                return _deviceFeatureSelect;
            case Common.DeviceFeature:
                return _deviceFeatureSelect < 2 ? (uint)((ulong)_device.ModernFeatures >> (int)_deviceFeatureSelect * 32) : 0;
            case Common.DriverFeatureSelect:
                return _driverFeatureSelect;
            case Common.DriverFeature:
                return _driverFeatureSelect < 2 ? (uint)((ulong)_device.AcceptedFeatures >> (int)_driverFeatureSelect * 32) : 0;
            case Common.ConfigVector:
                return _configVector;
            case Common.QueueCount:
                return (uint)_device.Queues.Length;
            case Common.Status:
                return (uint)_device.Status;
            case Common.Generation:
                return _device.ConfigGeneration;
            case Common.QueueSelect:
                return _queueSelect;
            case Common.QueueSize:
                return queue.Size;
            case Common.QueueVector:
                return Selected is null ? Msix.NoVector : queue.Vector;
            case Common.QueueEnable:
                return queue.Enabled ? 1u : 0u;
            case Common.QueueNotifyOffset:
                return _queueSelect;
            case >= Common.QueueDescriptors and < Common.QueueNotifyData:
                ulong address = (offset & ~7) switch
                {
                    (int)Common.QueueDescriptors => queue.Descriptors,
                    (int)Common.QueueDriver => queue.Driver,
                    _ => queue.Device,
                };
                return (uint)(address >> (offset & 7) * 8);
            case Common.QueueNotifyData:
                return _queueSelect;
            default:
                return 0;
        }
    }

    private void WriteCommon(int offset, AccessSize size, uint value)
    {
        switch ((Common)offset)
        {
            case Common.DeviceFeatureSelect:
                _deviceFeatureSelect = value;
                break;
            case Common.DriverFeatureSelect:
                _driverFeatureSelect = value;
                break;
            case Common.DriverFeature:
                _device.WriteFeatures((int)Math.Min(_driverFeatureSelect, 2), value);
                break;
            case Common.ConfigVector:
                Volatile.Write(ref _configVector, Vector(value));
                break;
            case Common.Status:
                _device.WriteStatus((byte)value, wait: false);
                break;
            case Common.QueueSelect:
                _queueSelect = (ushort)value;
                break;
            case Common.QueueSize:
                Selected?.Change(state => state with { Size = (ushort)value });
                break;
            case Common.QueueVector:
                Selected?.SetVector(Vector(value));
                break;
            case Common.QueueEnable:
                if (value == 1)
                    _device.EnableQueue(_queueSelect);
                break;
            case >= Common.QueueDescriptors and < Common.QueueNotifyData:
                if (size == AccessSize.Dword && (offset & 3) == 0)
                    Selected?.Change(state => WithAddress(state, offset, value));
                break;
            default:
                break;
        }
    }

    private static VirtqueueState WithAddress(VirtqueueState state, int offset, uint value)
    {
        ulong Half(ulong old) => (offset & 4) == 0 ? (old & 0xffff_ffff_0000_0000) | value : (uint)old | (ulong)value << 32;
        return (offset & ~7) switch
        {
            (int)Common.QueueDescriptors => state with { Descriptors = Half(state.Descriptors) },
            (int)Common.QueueDriver => state with { Driver = Half(state.Driver) },
            _ => state with { Device = Half(state.Device) },
        };
    }

    /// <summary>A vector that does not exist is answered with "none" (4.1.5.1.2.1).</summary>
    private ushort Vector(uint value) => (ushort)value < _msix.Vectors ? (ushort)value : Msix.NoVector;

    private uint ReadLegacy(int offset, AccessSize size)
    {
        VirtqueueState queue = Selected?.Setup ?? default;
        bool vectors = _msix.Enabled;
        switch ((Legacy)offset)
        {
            case Legacy.DeviceFeatures:
                return _device.LegacyFeatures;
            case Legacy.DriverFeatures:
                return (uint)_device.AcceptedFeatures;
            case Legacy.QueueAddress:
                return queue.Enabled ? (uint)(queue.Descriptors / LegacyPage) : 0;
            case Legacy.QueueSize:
                return Selected?.Maximum ?? 0;
            case Legacy.QueueSelect:
                return _queueSelect;
            case Legacy.Status:
                return (uint)_device.Status;
            case Legacy.Isr:
                return TakeIsr();
            case Legacy.ConfigVector when vectors:
                return _configVector;
            case Legacy.QueueVector when vectors:
                return Selected is null ? Msix.NoVector : queue.Vector;
            default:
                int config = (int)Legacy.ConfigVector + (vectors ? 4 : 0);
                return offset >= config ? _device.ReadConfig(offset - config, size) : 0;
        }
    }

    private void WriteLegacy(int offset, AccessSize size, uint value)
    {
        bool vectors = _msix.Enabled;
        switch ((Legacy)offset)
        {
            case Legacy.DriverFeatures:
                _device.WriteLegacyFeatures(value);
                break;
            case Legacy.QueueAddress:
                SetLegacyQueue(value);
                break;
            case Legacy.QueueSelect:
                _queueSelect = (ushort)value;
                break;
            case Legacy.QueueNotify:
                _device.Kick((ushort)value);
                break;
            case Legacy.Status:
                _device.WriteStatus((byte)value, wait: true);
                break;
            case Legacy.ConfigVector when vectors:
                Volatile.Write(ref _configVector, Vector(value));
                break;
            case Legacy.QueueVector when vectors:
                Selected?.SetVector(Vector(value));
                break;
            default:
                int config = (int)Legacy.ConfigVector + (vectors ? 4 : 0);
                if (offset >= config)
                    _device.WriteConfig(offset - config, size, value);
                break;
        }
    }

    /// <summary>The three parts of a legacy ring follow one another, the used ring on a page of its own (2.7.2).</summary>
    private void SetLegacyQueue(uint page)
    {
        if (Selected is not { } queue)
            return;
        if (page == 0)
        {
            queue.Reset();
            return;
        }
        ulong size = queue.Maximum;
        ulong descriptors = page * LegacyPage;
        ulong driver = descriptors + size * 16;
        ulong device = (driver + 6 + 2 * size + LegacyPage - 1) & ~(LegacyPage - 1);
        queue.Change(state => state with { Size = (ushort)size, Descriptors = descriptors, Driver = driver, Device = device });
        _device.EnableQueue(queue.Index);
    }

    private sealed class MemoryRegion(VirtioPci owner) : IMmioDevice, IDoorbellRegion
    {
        private Doorbell[]? _doorbells;

        public IReadOnlyList<Doorbell> Doorbells => _doorbells ??=
            owner._device.Doorbells(static (index, bell) => new Doorbell((ulong)(NotifyOffset + index * NotifyMultiplier), 0, null, bell));

        public ulong Read(ulong offset, AccessSize size) => owner.ReadMemory((int)offset, size);

        public void Write(ulong offset, AccessSize size, ulong value) => owner.WriteMemory((int)offset, size, value);
    }

    private sealed class LegacyRegion(VirtioPci owner) : IPortDevice
    {
        public uint ReadPort(ushort port, AccessSize size) => owner.ReadLegacy(port, size);

        public void WritePort(ushort port, AccessSize size, uint value) => owner.WriteLegacy(port, size, value);
    }
}
