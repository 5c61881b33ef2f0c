using System;
using System.Buffers.Binary;

namespace Kvasir.Devices.Pci;

/// <summary>The PCI Express capability (PCI Express Base specification, 7.5.3), version 2.</summary>
public static class PcieCapability
{
    internal enum Offset
    {
        Capabilities = 0x02,
        DeviceCapabilities = 0x04,
        DeviceControl = 0x08,
        DeviceStatus = 0x0a,
        LinkCapabilities = 0x0c,
        LinkControl = 0x10,
        LinkStatus = 0x12,
        SlotCapabilities = 0x14,
        SlotControl = 0x18,
        SlotStatus = 0x1a,
        RootControl = 0x1c,
        RootStatus = 0x20,
        LinkCapabilities2 = 0x2c,
        LinkControl2 = 0x30,
        End = 0x3c,
    }

    internal enum PortType
    {
        Endpoint = 0,
        RootPort = 4,
        IntegratedEndpoint = 9,
    }

    /// <summary>A link of one lane at 2.5 GT/s.</summary>
    internal const uint Link = 1 | 1 << 4;

    /// <summary>Makes a function an endpoint behind a port.</summary>
    public static void AddEndpoint(PciFunction function) => Add(function, PortType.Endpoint, slot: false);

    internal static int Add(PciFunction function, PortType type, bool slot)
    {
        byte[] body = new byte[(int)Offset.End - 2];
        void Word(Offset at, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(body.AsSpan((int)at - 2), value);
        void Double(Offset at, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan((int)at - 2), value);
        const ushort version = 2;
        const uint roleBasedErrors = 1 << 15;
        Word(Offset.Capabilities, (ushort)(version | (int)type << 4 | (slot ? 1 << 8 : 0)));
        Double(Offset.DeviceCapabilities, roleBasedErrors);
        if (type != PortType.IntegratedEndpoint)
        {
            Double(Offset.LinkCapabilities, Link);
            Word(Offset.LinkStatus, (ushort)Link);
        }
        int at = function.AddCapability(PciCapabilityId.Express, body);
        function.Writable16(at + (int)Offset.DeviceControl, 0x7fff);
        function.ClearedByOnes16(at + (int)Offset.DeviceStatus, 0x000f);
        function.Writable16(at + (int)Offset.LinkControl, 0x01fb);
        return at;
    }
}
