using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// The two address spaces behind the host bridge: which region of which function answers an address, going by base address registers and bridge
/// windows. A guest may move regions at any moment and put them over one another: the table is made anew and replaced as a whole, and where two
/// overlap the one in the lower slot answers. Look-ups take no lock and allocate nothing.
/// </summary>
internal sealed class PciSpace
{
    private readonly record struct Claim(ulong Start, ulong End, PciBar Bar) : IAddressRegion;

    private sealed record Table(Claim[] Memory, Claim[] Ports);

    private readonly Lock _lock = new();
    private volatile Table _table = new([], []);
    private PciBus? _root;
    private IDoorbellTaker? _doorbellTaker;

    public void Connect(PciBus root)
    {
        _root = root;
        Update();
    }

    /// <summary>Makes the table anew.</summary>
    public void Update()
    {
        if (_root is null)
            return;
        lock (_lock)
        {
            List<Claim> memory = [];
            List<Claim> ports = [];
            Collect(_root, PciWindow.All, PciWindow.All, PciWindow.All, memory, ports);
            Table old = _table;
            _table = new Table(Sorted(memory), Sorted(ports));
            if (_doorbellTaker is { } taker)
                MoveDoorbells(taker, old.Memory, _table.Memory);
        }
    }

    /// <summary>Has doorbells in the regions, wherever they are moved to, go to an accelerator.</summary>
    public void Connect(IDoorbellTaker taker)
    {
        lock (_lock)
        {
            _doorbellTaker = taker;
            MoveDoorbells(taker, [], _table.Memory);
        }
    }

    private static void MoveDoorbells(IDoorbellTaker taker, Claim[] old, Claim[] now)
    {
        foreach (Claim claim in old)
        {
            if (claim.Bar.Memory is IDoorbellRegion region && Array.IndexOf(now, claim) < 0)
                taker.Remove(region, claim.Start);
        }
        foreach (Claim claim in now)
        {
            if (claim.Bar.Memory is IDoorbellRegion region && Array.IndexOf(old, claim) < 0)
                taker.Place(region, claim.Start);
        }
    }

    public bool TryReadMemory(ulong address, AccessSize size, out ulong value)
    {
        value = 0;
        if (!TryFind(_table.Memory, address, out Claim claim))
            return false;
        int bytes = (int)size;
        if (bytes > (int)claim.Bar.MaxSize || address + (ulong)bytes > claim.End)
        {
            AccessSize half = (AccessSize)(bytes / 2);
            _ = TryReadMemory(address, half, out ulong low);
            if (!TryReadMemory(address + (ulong)half, half, out ulong high))
                high = ulong.MaxValue >> 64 - (int)half * 8;
            value = low | high << (int)half * 8;
            return true;
        }
        value = claim.Bar.Memory!.Read(address - claim.Start, size);
        if (bytes < 8)
            value &= (1ul << bytes * 8) - 1;
        return true;
    }

    public void WriteMemory(ulong address, AccessSize size, ulong value)
    {
        if (!TryFind(_table.Memory, address, out Claim claim))
            return;
        int bytes = (int)size;
        if (bytes > (int)claim.Bar.MaxSize || address + (ulong)bytes > claim.End)
        {
            AccessSize half = (AccessSize)(bytes / 2);
            WriteMemory(address, half, value & (1ul << (int)half * 8) - 1);
            WriteMemory(address + (ulong)half, half, value >> (int)half * 8);
            return;
        }
        claim.Bar.Memory!.Write(address - claim.Start, size, value);
    }

    public bool TryReadPort(ushort port, AccessSize size, out uint value)
    {
        value = 0;
        if (!TryFind(_table.Ports, port, out Claim claim) || !Fits(claim, port, size))
            return false;
        value = claim.Bar.Ports!.ReadPort((ushort)(port - claim.Start), size);
        return true;
    }

    public bool TryWritePort(ushort port, AccessSize size, uint value)
    {
        if (!TryFind(_table.Ports, port, out Claim claim) || !Fits(claim, port, size))
            return false;
        claim.Bar.Ports!.WritePort((ushort)(port - claim.Start), size, value);
        return true;
    }

    private static bool Fits(in Claim claim, ushort port, AccessSize size) => size <= claim.Bar.MaxSize && port + (ulong)size <= claim.End;

    private static void Collect(PciBus bus, PciWindow io, PciWindow window, PciWindow prefetchable, List<Claim> memory, List<Claim> ports)
    {
        foreach (PciFunction function in bus.Functions)
        {
            for (int number = 0; number < 6; number++)
            {
                if (function.Bar(number) is not { } bar || !function.TryGetBarAddress(bar, out ulong address))
                    continue;
                bool through = bar.Kind switch
                {
                    PciBarKind.Io => io.Contains(address, bar.Size),
                    _ => window.Contains(address, bar.Size) || prefetchable.Contains(address, bar.Size),
                };
                if (through)
                    (bar.Kind == PciBarKind.Io ? ports : memory).Add(new Claim(address, address + bar.Size, bar));
            }
            if (function is PciBridge bridge)
                Collect(bridge.Secondary, bridge.Ports, bridge.Memory, bridge.Prefetchable, memory, ports);
        }
    }

    private static Claim[] Sorted(List<Claim> claims)
    {
        List<Claim> kept = [];
        foreach (Claim claim in claims)
        {
            if (!kept.Exists(other => claim.Start < other.End && other.Start < claim.End))
                kept.Add(claim);
        }
        kept.Sort((a, b) => a.Start.CompareTo(b.Start));
        return [.. kept];
    }

    private static bool TryFind(Claim[] claims, ulong address, out Claim claim) => AddressRegions.TryFind<Claim>(claims, address, out claim);
}
