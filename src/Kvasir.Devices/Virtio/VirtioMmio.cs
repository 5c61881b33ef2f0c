using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <summary>Virtio over memory-mapped registers, version 2 (virtio 1.2, 4.2): what machines without PCI have.</summary>
public sealed class VirtioMmio : IMmioDevice, IDoorbellRegion, IVirtioTransport, IResettable, IStateful<VirtioMmio.State>
{
    /// <summary>What the transport itself holds, beside the device's state, before which it is restored.</summary>
    public record struct State(uint DeviceFeatureSelect, uint DriverFeatureSelect, uint QueueSelect, uint Interrupts);

    /// <summary>Bytes of its region.</summary>
    public const ulong RegionSize = 0x200;

    private const uint MagicValue = 0x7472_6976;
    private const uint VersionModern = 2;
    private const uint Vendor = 0x5356_414b;

    private enum Register
    {
        Magic = 0x000,
        Version = 0x004,
        DeviceId = 0x008,
        VendorId = 0x00c,
        DeviceFeatures = 0x010,
        DeviceFeatureSelect = 0x014,
        DriverFeatures = 0x020,
        DriverFeatureSelect = 0x024,
        QueueSelect = 0x030,
        QueueSizeMaximum = 0x034,
        QueueSize = 0x038,
        QueueReady = 0x044,
        QueueNotify = 0x050,
        InterruptStatus = 0x060,
        InterruptAcknowledge = 0x064,
        Status = 0x070,
        QueueDescriptorsLow = 0x080,
        QueueDescriptorsHigh = 0x084,
        QueueDriverLow = 0x090,
        QueueDriverHigh = 0x094,
        QueueDeviceLow = 0x0a0,
        QueueDeviceHigh = 0x0a4,
        SharedMemoryLengthLow = 0x0b0,
        SharedMemoryBaseHigh = 0x0bc,
        ConfigGeneration = 0x0fc,
        Config = 0x100,
    }

    // Wiring
    private readonly VirtioDevice _device;
    private readonly IIrqLine _irq;

    // State
    private readonly Lock _lock = new();
    private uint _deviceFeatureSelect;
    private uint _driverFeatureSelect;
    private uint _queueSelect;
    private uint _interrupts;
    private Doorbell[]? _doorbells;

    /// <param name="device">The device; its transport is this from now on.</param>
    /// <param name="irq">Its wire, level-triggered.</param>
    public VirtioMmio(VirtioDevice device, IIrqLine irq)
    {
        _device = device;
        _irq = irq;
        device.Connect(this);
    }

    public IReadOnlyList<Doorbell> Doorbells => _doorbells ??=
        _device.Doorbells(static (index, bell) => new Doorbell((ulong)Register.QueueNotify, sizeof(uint), (uint)index, bell));

    public void InterruptQueue(Virtqueue queue) => Raise(1);

    public void InterruptConfig() => Raise(2);

    public void DeviceReset()
    {
        lock (_lock)
        {
            _deviceFeatureSelect = 0;
            _driverFeatureSelect = 0;
            _queueSelect = 0;
            _interrupts = 0;
            _irq.Set(false);
        }
    }

    public void Reset() => _device.Reset();

    public State Save()
    {
        lock (_lock)
            return new State(_deviceFeatureSelect, _driverFeatureSelect, _queueSelect, _interrupts);
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _deviceFeatureSelect = state.DeviceFeatureSelect;
            _driverFeatureSelect = state.DriverFeatureSelect;
            _queueSelect = state.QueueSelect;
            _interrupts = state.Interrupts;
            _irq.Set(_interrupts != 0);
        }
    }

    public ulong Read(ulong offset, AccessSize size)
    {
        if (offset >= (ulong)Register.Config)
            return _device.ReadConfig((int)offset - (int)Register.Config, size);
        if (size != AccessSize.Dword)
            return 0;
        VirtqueueState queue = Selected?.Setup ?? default;
        return (Register)offset switch
        {
            Register.Magic => MagicValue,
            Register.Version => VersionModern,
            Register.DeviceId => (uint)_device.Type,
            Register.VendorId => Vendor,
            Register.DeviceFeatures => _deviceFeatureSelect < 2 ? (uint)((ulong)_device.ModernFeatures >> (int)_deviceFeatureSelect * 32) : 0,
            Register.QueueSizeMaximum => Selected?.Maximum ?? 0u,
            Register.QueueReady => queue.Enabled ? 1u : 0u,
            Register.InterruptStatus => Volatile.Read(ref _interrupts),
            Register.Status => (uint)_device.Status,
            Register.ConfigGeneration => _device.ConfigGeneration,
            // No shared memory regions.
            >= Register.SharedMemoryLengthLow and <= Register.SharedMemoryBaseHigh => uint.MaxValue,
            _ => 0,
        };
    }

    public void Write(ulong offset, AccessSize size, ulong value)
    {
        if (offset >= (ulong)Register.Config)
        {
            _device.WriteConfig((int)offset - (int)Register.Config, size, (uint)value);
            return;
        }
        if (size != AccessSize.Dword)
            return;
        uint word = (uint)value;
        switch ((Register)offset)
        {
            case Register.DeviceFeatureSelect:
                _deviceFeatureSelect = word;
                break;
            case Register.DriverFeatures:
                _device.WriteFeatures((int)System.Math.Min(_driverFeatureSelect, 2), word);
                break;
            case Register.DriverFeatureSelect:
                _driverFeatureSelect = word;
                break;
            case Register.QueueSelect:
                _queueSelect = word;
                break;
            case Register.QueueSize:
                Selected?.Change(state => state with { Size = (ushort)word });
                break;
            case Register.QueueReady:
                if (word == 1)
                    _device.EnableQueue((int)_queueSelect);
                break;
            case Register.QueueNotify:
                _device.Kick((ushort)word);
                break;
            case Register.InterruptAcknowledge:
                Acknowledge(word);
                break;
            case Register.Status:
                // Drivers of this transport do not look whether a reset has come to its end.
                _device.WriteStatus((byte)word, wait: true);
                break;
            case >= Register.QueueDescriptorsLow and <= Register.QueueDeviceHigh:
                Selected?.Change(state => WithAddress(state, (Register)offset, word));
                break;
            default:
                break;
        }
    }

    private Virtqueue? Selected => _queueSelect < (uint)_device.Queues.Length ? _device.Queues[(int)_queueSelect] : null;

    private static VirtqueueState WithAddress(VirtqueueState state, Register register, uint value) => register switch
    {
        Register.QueueDescriptorsLow => state with { Descriptors = Low(state.Descriptors, value) },
        Register.QueueDescriptorsHigh => state with { Descriptors = High(state.Descriptors, value) },
        Register.QueueDriverLow => state with { Driver = Low(state.Driver, value) },
        Register.QueueDriverHigh => state with { Driver = High(state.Driver, value) },
        Register.QueueDeviceLow => state with { Device = Low(state.Device, value) },
        Register.QueueDeviceHigh => state with { Device = High(state.Device, value) },
        _ => state,
    };

    private static ulong Low(ulong old, uint value) => (old & 0xffff_ffff_0000_0000) | value;

    private static ulong High(ulong old, uint value) => (uint)old | (ulong)value << 32;

    private void Raise(uint reason)
    {
        lock (_lock)
        {
            _interrupts |= reason;
            _irq.Set(true);
        }
    }

    private void Acknowledge(uint bits)
    {
        lock (_lock)
        {
            _interrupts &= ~bits;
            _irq.Set(_interrupts != 0);
        }
    }
}
