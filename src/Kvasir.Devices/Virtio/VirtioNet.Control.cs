using System;
using System.Buffers.Binary;
using Kvasir.Network;

namespace Kvasir.Devices.Virtio;

/// <content>The control queue (virtio 1.2, 5.1.6.5). On the device's own thread.</content>
public sealed partial class VirtioNet
{
    private const int HeaderBytes = 2;

    private void ProcessControl(Virtqueue queue)
    {
        while (queue.Pop() is { } element)
        {
            // The last byte that the driver gives for writing takes the answer.
            if (element.WritableLength < 1)
            {
                Fail("a control command without a place for its answer");
                queue.Forget(element);
                return;
            }
            ControlResult result = element.TryRead(0, out ControlHeader header) && Carry(header, element) ? ControlResult.Ok : ControlResult.Error;
            element.Write(0, [(byte)result]);
            queue.Push(element, 1);
        }
        queue.Notify();
    }

    /// <summary>Carries a command out.</summary>
    /// <returns>Whether it was one that this device has, with sound arguments.</returns>
    private bool Carry(ControlHeader header, VirtqueueElement element) => header.Class switch
    {
        ControlClass.Receive => Has(Feature.ControlReceive) && SetReceive((ReceiveCommand)header.Command, element),
        ControlClass.Mac => (MacCommand)header.Command switch
        {
            MacCommand.SetTable => Has(Feature.ControlReceive) && SetMacTable(element),
            MacCommand.SetAddress => Has(Feature.ControlMacAddress) && SetMacAddress(element),
            _ => false,
        },
        ControlClass.Vlan => Has(Feature.ControlVlan) && SetVlan((VlanCommand)header.Command, element),
        ControlClass.Announce => Has(Feature.GuestAnnounce) && header.Command == 0 && AcknowledgeAnnouncement(),
        ControlClass.MultiQueue => Has(Feature.MultiQueue) && header.Command == 0 && SetPairs(element),
        ControlClass.GuestOffloads => Has(Feature.ControlGuestOffloads) && header.Command == 0 && SetGuestOffloads(element),
        _ => false,
    };

    private bool SetReceive(ReceiveCommand command, VirtqueueElement element)
    {
        if (!element.TryRead(HeaderBytes, out byte value))
            return false;
        bool on = value != 0;
        if (command > ReceiveCommand.AllMulticast && !Has(Feature.ControlReceiveExtra))
            return false;
        switch (command)
        {
            case ReceiveCommand.Promiscuous:
                _filter.Change(table => table with { Promiscuous = on });
                return true;
            case ReceiveCommand.AllMulticast:
                _filter.Change(table => table with { AllMulticast = on });
                return true;
            case ReceiveCommand.AllUnicast:
                _filter.Change(table => table with { AllUnicast = on });
                return true;
            case ReceiveCommand.NoMulticast:
                _filter.Change(table => table with { NoMulticast = on });
                return true;
            case ReceiveCommand.NoUnicast:
                _filter.Change(table => table with { NoUnicast = on });
                return true;
            case ReceiveCommand.NoBroadcast:
                _filter.Change(table => table with { NoBroadcast = on });
                return true;
            default:
                return false;
        }
    }

    private bool SetMacTable(VirtqueueElement element)
    {
        long at = HeaderBytes;
        if (!ReadAddresses(element, ref at, out ulong[] unicast, out bool moreUnicast) || !ReadAddresses(element, ref at, out ulong[] multicast, out bool moreMulticast)
            || at != element.ReadableLength)
        {
            return false;
        }
        _filter.Change(table => table with
        {
            Unicast = unicast,
            Multicast = multicast,
            // More than are kept: all of the kind (5.1.6.5.2 lets a device filter less than it is asked to).
            AllUnicast = table.AllUnicast || moreUnicast,
            AllMulticast = table.AllMulticast || moreMulticast,
        });
        return true;
    }

    private static bool ReadAddresses(VirtqueueElement element, ref long at, out ulong[] addresses, out bool more)
    {
        addresses = [];
        more = false;
        if (!element.TryRead(at, out uint count))
            return false;
        at += sizeof(uint);
        if (count * (long)ReceiveFilter.AddressSize > element.ReadableLength - at)
            return false;
        more = count > ReceiveFilter.MaximumAddresses;
        addresses = new ulong[Math.Min(count, ReceiveFilter.MaximumAddresses)];
        Span<byte> address = stackalloc byte[ReceiveFilter.AddressSize];
        for (int index = 0; index < addresses.Length; index++)
        {
            element.Read(at + index * ReceiveFilter.AddressSize, address);
            addresses[index] = ReceiveFilter.ReadAddress(address);
        }
        at += count * (long)ReceiveFilter.AddressSize;
        return true;
    }

    private bool SetMacAddress(VirtqueueElement element)
    {
        Span<byte> address = stackalloc byte[ReceiveFilter.AddressSize];
        if (element.ReadableLength != HeaderBytes + address.Length || element.Read(HeaderBytes, address) != address.Length)
            return false;
        ulong value = ReceiveFilter.ReadAddress(address);
        _filter.Change(table => table with { Address = value });
        return true;
    }

    private bool SetVlan(VlanCommand command, VirtqueueElement element)
    {
        if (!element.TryRead(HeaderBytes, out ushort vlan) || vlan > 4095 || command is not (VlanCommand.Add or VlanCommand.Delete))
            return false;
        _filter.SetVlan(vlan, command == VlanCommand.Add);
        return true;
    }

    private bool AcknowledgeAnnouncement()
    {
        lock (_linkLock)
        {
            _announce = false;
            Span<byte> status = stackalloc byte[2];
            BinaryPrimitives.WriteUInt16LittleEndian(status, (ushort)(HasLink ? LinkUp : 0));
            SetConfig((int)Config.Status, status);
        }
        return true;
    }

    private bool SetPairs(VirtqueueElement element)
    {
        if (!element.TryRead(HeaderBytes, out ushort pairs) || pairs < 1 || pairs > _pairs.Length)
            return false;
        _activePairs = pairs;
        return true;
    }

    private bool SetGuestOffloads(VirtqueueElement element)
    {
        if (!element.TryRead(HeaderBytes, out ulong bits))
            return false;
        Feature asked = (Feature)bits;
        const Feature switchable = Feature.GuestChecksum | Feature.GuestTso4 | Feature.GuestTso6 | Feature.GuestEcn;
        // Only what was agreed on can be switched (5.1.6.5.6.1).
        if ((asked & ~switchable) != 0 || ((ulong)asked & ~(ulong)AcceptedFeatures) != 0)
            return false;
        NetworkOffloads offloads = NetworkOffloads.None;
        if (asked.HasFlag(Feature.GuestChecksum))
            offloads |= NetworkOffloads.Checksum;
        if (asked.HasFlag(Feature.GuestTso4))
            offloads |= NetworkOffloads.Tso4;
        if (asked.HasFlag(Feature.GuestTso6))
            offloads |= NetworkOffloads.Tso6;
        if (asked.HasFlag(Feature.GuestEcn))
            offloads |= NetworkOffloads.TsoEcn;
        _offloads = offloads;
        _backend.SetReceiveOffloads(offloads);
        return true;
    }
}
