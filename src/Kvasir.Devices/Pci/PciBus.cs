using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// A bus of 32 devices with 8 functions each. Functions come and go while the machine runs; look-ups take no lock. What a bus needs of the machine
/// (where pins lead, where messages go, the memory map) it has from the host bridge or from the bridge above it.
/// </summary>
public sealed class PciBus
{
    private const int Slots = 32;

    // Wiring
    private readonly Action<int, int, bool> _setPin;
    private readonly Action _mapChanged;

    // State
    private readonly Lock _plugging = new();
    private readonly PciFunction?[] _functions = new PciFunction?[Slots * 8];

    /// <param name="msi">Where message-signalled interrupts go.</param>
    /// <param name="setPin">Drives INTA (0) to INTD (3) of a device.</param>
    /// <param name="mapChanged">Told when what its functions decode has changed.</param>
    public PciBus(IMsiSink msi, Action<int, int, bool> setPin, Action mapChanged)
    {
        Msi = msi;
        _setPin = setPin;
        _mapChanged = mapChanged;
    }

    public IMsiSink Msi { get; }

    /// <summary>Puts a function in its slot.</summary>
    /// <exception cref="ArgumentException">The slot is taken.</exception>
    public void Plug(PciFunction function, PciSlot slot)
    {
        lock (_plugging)
        {
            if (_functions[slot.Devfn] is { } other)
                throw new ArgumentException($"slot {slot.Device:x2}.{slot.Function} is taken by {other.Name}");
            function.Attach(this, slot);
            Volatile.Write(ref _functions[slot.Devfn], function);
        }
        MapChanged();
    }

    /// <summary>Takes a function out.</summary>
    public void Unplug(PciFunction function)
    {
        lock (_plugging)
        {
            if (_functions[function.Slot.Devfn] != function)
                return;
            Volatile.Write(ref _functions[function.Slot.Devfn], null);
            function.Detach();
        }
        MapChanged();
    }

    /// <summary>The lowest device number from <paramref name="first"/> on that no function has; -1 where all are taken.</summary>
    public int FreeDevice(int first = 0)
    {
        for (int device = first; device < Slots; device++)
        {
            if (Array.TrueForAll(_functions[(device * 8)..(device * 8 + 8)], function => function is null))
                return device;
        }
        return -1;
    }

    /// <summary>The function in a slot, or null.</summary>
    public PciFunction? Find(int devfn) => Volatile.Read(ref _functions[devfn]);

    /// <summary>All functions, in slot order.</summary>
    public IEnumerable<PciFunction> Functions
    {
        get
        {
            for (int devfn = 0; devfn < _functions.Length; devfn++)
            {
                if (Find(devfn) is { } function)
                    yield return function;
            }
        }
    }

    internal void SetIntx(int device, int pin, bool asserted) => _setPin(device, pin, asserted);

    internal void MapChanged() => _mapChanged();

    /// <summary>The function that a configuration access on some bus reaches, going down bridges; null for none.</summary>
    internal PciFunction? Route(int ownNumber, int bus, int devfn)
    {
        if (bus == ownNumber)
            return Find(devfn);
        for (int i = 0; i < _functions.Length; i++)
        {
            if (Find(i) is PciBridge bridge && bus >= bridge.SecondaryNumber && bus <= bridge.SubordinateNumber && bridge.SecondaryNumber != 0)
                return bridge.Secondary.Route(bridge.SecondaryNumber, bus, devfn);
        }
        return null;
    }
}
