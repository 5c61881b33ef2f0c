using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// A PCI Express root port with a slot that devices come to and go from while the guest runs (PCI Express Base specification, 6.7 and 7.5.3; the port of the
/// ICH9, datasheet 316972, ch. 20). Its slot has an attention button and indicators, and completes commands at once.
/// </summary>
/// <remarks>
/// It has no power controller: an empty slot with power on lets a link come up, and a system acts on that at once. Behind a button and a power controller
/// it would wait for the button, and five seconds more, for each device that comes (6.7.1.5).
/// </remarks>
public sealed class PcieRootPort : PciBridge
{
    [Flags]
    private enum SlotCapabilities : uint
    {
        AttentionButton = 1 << 0,
        AttentionIndicator = 1 << 3,
        PowerIndicator = 1 << 4,
        HotPlug = 1 << 6,
        NoCommandCompleted = 1 << 18,
    }

    [Flags]
    private enum SlotControl : ushort
    {
        AttentionButtonEvent = 1 << 0,
        PresenceEvent = 1 << 3,
        HotPlugInterrupt = 1 << 5,
        PowerIndicator = 3 << 8,
        LinkEvent = 1 << 12,
        Writable = 0x1bff,
    }

    [Flags]
    private enum SlotStatus : ushort
    {
        AttentionButton = 1 << 0,
        PresenceChanged = 1 << 3,
        Present = 1 << 6,
        LinkChanged = 1 << 8,
        Events = 0x011f,
    }

    private const ushort LinkActive = 1 << 13;
    private const uint LinkActiveReporting = 1 << 20;

    // Configuration
    private readonly int _express;

    // State
    private readonly Lock _slotLock = new();
    private PciFunction? _occupant;
    private bool _removalAsked;
    private bool _interrupting;

    /// <param name="number">Of the slot, from 1; guests show it.</param>
    public PcieRootPort(string name, int number, IMsiSink msi)
        : base(name, new PciIdentity(0x8086, (ushort)(0x2940 + (number - 1) * 2), PciClass.PciBridge, Revision: 2), msi)
    {
        Number = number;
        UsePin((number - 1) % 4 + 1);
        _express = PcieCapability.Add(this, PcieCapability.PortType.RootPort, slot: true);
        const SlotCapabilities slot = SlotCapabilities.AttentionButton | SlotCapabilities.AttentionIndicator
            | SlotCapabilities.PowerIndicator | SlotCapabilities.HotPlug | SlotCapabilities.NoCommandCompleted;
        const uint link = PcieCapability.Link | LinkActiveReporting;
        SetInitial(At(PcieCapability.Offset.LinkCapabilities), BitConverter.GetBytes(link | (uint)number << 24));
        SetInitial(At(PcieCapability.Offset.SlotCapabilities), BitConverter.GetBytes((uint)slot | (uint)number << 19));
        Writable16(At(PcieCapability.Offset.SlotControl), (ushort)SlotControl.Writable);
        ClearedByOnes16(At(PcieCapability.Offset.SlotStatus), (ushort)SlotStatus.Events);
        Writable16(At(PcieCapability.Offset.RootControl), 0x001f);
        ClearedByOnes16(At(PcieCapability.Offset.RootStatus) + 2, 0x0001);
        AddMsi();
    }

    /// <summary>Of the slot, from 1.</summary>
    public int Number { get; }

    /// <summary>What is in the slot.</summary>
    public PciFunction? Occupant
    {
        get
        {
            lock (_slotLock)
                return _occupant;
        }
    }

    /// <summary>The guest has let go of what was to be removed, and it is out of the slot. On a vCPU's thread.</summary>
    public event Action<PciFunction>? Ejected;

    /// <summary>Puts a device into the slot. A guest that runs notices by itself.</summary>
    /// <exception cref="ArgumentException">The slot is taken.</exception>
    public void Insert(PciFunction function)
    {
        lock (_slotLock)
        {
            if (_occupant is not null)
                throw new ArgumentException($"slot {Number} is taken by {_occupant.Name}");
            Secondary.Plug(function, new PciSlot(0));
            _occupant = function;
            _removalAsked = false;
            ShowPresence(changed: true);
        }
        DriveInterrupt();
    }

    /// <summary>Presses the slot's attention button: the guest is asked to let go of the device. It may take seconds, or never answer.</summary>
    public void RequestRemoval()
    {
        lock (_slotLock)
        {
            if (_occupant is null)
                return;
            _removalAsked = true;
            Status |= SlotStatus.AttentionButton;
        }
        DriveInterrupt();
    }

    public override void Reset()
    {
        base.Reset();
        PciFunction? gone = null;
        lock (_slotLock)
        {
            // Who was asked to remove a device and is reset instead finds it gone.
            if (_removalAsked)
                gone = TakeOut();
            ShowPresence(changed: false);
            _interrupting = false;
        }
        if (gone is not null)
            Ejected?.Invoke(gone);
    }

    protected override void WrittenConfig(int offset, int bytes)
    {
        base.WrittenConfig(offset, bytes);
        if (offset >= _express + (int)PcieCapability.Offset.RootControl || offset + bytes <= At(PcieCapability.Offset.SlotControl))
            return;
        PciFunction? gone = null;
        lock (_slotLock)
        {
            // Off: the system has let go of the device.
            if (_removalAsked && (Control & SlotControl.PowerIndicator) == SlotControl.PowerIndicator)
                gone = TakeOut();
            if (gone is not null)
                ShowPresence(changed: true);
        }
        DriveInterrupt();
        if (gone is not null)
            Ejected?.Invoke(gone);
    }

    private SlotControl Control => (SlotControl)Get16(At(PcieCapability.Offset.SlotControl));

    private SlotStatus Status
    {
        get => (SlotStatus)Get16(At(PcieCapability.Offset.SlotStatus));
        set => Store(At(PcieCapability.Offset.SlotStatus), 2, (ushort)value);
    }

    private int At(PcieCapability.Offset offset) => _express + (int)offset;

    private PciFunction? TakeOut()
    {
        PciFunction? function = _occupant;
        _occupant = null;
        _removalAsked = false;
        if (function is not null)
            Secondary.Unplug(function);
        return function;
    }

    /// <summary>Has presence and link follow what is in the slot.</summary>
    private void ShowPresence(bool changed)
    {
        bool active = _occupant is not null;
        SlotStatus status = Status & ~SlotStatus.Present;
        bool wasPresent = (Status & SlotStatus.Present) != 0;
        if (_occupant is not null)
            status |= SlotStatus.Present;
        if (changed && wasPresent != (_occupant is not null))
            status |= SlotStatus.PresenceChanged;
        ushort link = (ushort)((Get16(At(PcieCapability.Offset.LinkStatus)) & ~LinkActive) | (active ? LinkActive : 0));
        if (changed && link != Get16(At(PcieCapability.Offset.LinkStatus)))
            status |= SlotStatus.LinkChanged;
        Store(At(PcieCapability.Offset.LinkStatus), 2, link);
        Status = status;
    }

    /// <summary>One message when the first event comes up; the pin for as long as there is one.</summary>
    private void DriveInterrupt()
    {
        bool wanted;
        bool risen;
        lock (_slotLock)
        {
            SlotControl control = Control;
            SlotStatus heard = SlotStatus.AttentionButton & (SlotStatus)control;
            if ((control & SlotControl.PresenceEvent) != 0)
                heard |= SlotStatus.PresenceChanged;
            if ((control & SlotControl.LinkEvent) != 0)
                heard |= SlotStatus.LinkChanged;
            wanted = (control & SlotControl.HotPlugInterrupt) != 0 && (Status & heard) != 0;
            risen = wanted && !_interrupting;
            _interrupting = wanted;
        }
        if (Msi!.Enabled)
        {
            if (risen)
                Msi.Send(0);
            SetIntx(false);
        }
        else
        {
            SetIntx(wanted);
        }
    }
}
