using System;
using System.Threading;

namespace Kvasir.Core;

/// <summary>
/// The devices of the guest-physical address space. A look-up is a binary search in a sorted table that is replaced as a whole when a mapping
/// changes: it takes no lock and allocates nothing. Accesses wider than a device takes are split in ascending order; narrower ones than
/// its minimum read a whole unit and cut it, and write a whole unit with the other bytes zero. Unclaimed reads give all ones.
/// </summary>
public sealed class MmioBus
{
    private readonly record struct Claim(ulong Start, ulong End, IMmioDevice Device, int MinSize, int MaxSize) : IAddressRegion;

    private readonly Lock _mapping = new();
    private volatile Claim[] _claims = [];
    private IDoorbellTaker? _doorbellTaker;

    /// <summary>Has doorbells in the regions, now and later, go to an accelerator.</summary>
    public void Connect(IDoorbellTaker taker)
    {
        lock (_mapping)
        {
            _doorbellTaker = taker;
            foreach (Claim claim in _claims)
            {
                if (claim.Device is IDoorbellRegion region)
                    taker.Place(region, claim.Start);
            }
        }
    }

    /// <summary>Gives a region of <paramref name="length"/> bytes at <paramref name="start"/> to a device.</summary>
    /// <exception cref="ArgumentException">The region is empty, wraps, or overlaps another.</exception>
    public void Map(Gpa start, ulong length, IMmioDevice device, AccessSize minSize = AccessSize.Byte, AccessSize maxSize = AccessSize.Qword)
    {
        ulong end = start.Value + length;
        if (length == 0 || end < start.Value)
            throw new ArgumentException($"no region of {length} bytes at {start}");
        lock (_mapping)
        {
            Claim[] old = _claims;
            int at = 0;
            while (at < old.Length && old[at].Start < start.Value)
                at++;
            if ((at > 0 && old[at - 1].End > start.Value) || (at < old.Length && old[at].Start < end))
                throw new ArgumentException($"the region of {length} bytes at {start} overlaps another device");
            Claim[] claims = new Claim[old.Length + 1];
            Array.Copy(old, claims, at);
            claims[at] = new Claim(start.Value, end, device, (int)minSize, (int)maxSize);
            Array.Copy(old, at, claims, at + 1, old.Length - at);
            _claims = claims;
            if (device is IDoorbellRegion region)
                _doorbellTaker?.Place(region, start.Value);
        }
    }

    /// <summary>Takes back the region that starts at <paramref name="start"/>.</summary>
    /// <returns>False where no region starts there.</returns>
    public bool Unmap(Gpa start)
    {
        lock (_mapping)
        {
            int at = Array.FindIndex(_claims, c => c.Start == start.Value);
            if (at < 0)
                return false;
            if (_claims[at].Device is IDoorbellRegion region)
                _doorbellTaker?.Remove(region, start.Value);
            Claim[] claims = new Claim[_claims.Length - 1];
            Array.Copy(_claims, claims, at);
            Array.Copy(_claims, at + 1, claims, at, claims.Length - at);
            _claims = claims;
            return true;
        }
    }

    public ulong Read(Gpa address, AccessSize size)
    {
        int bytes = (int)size;
        if (!TryFind(address.Value, out Claim claim))
            return bytes == 1 || !Straddles(address.Value, bytes) ? Mask(bytes) : ReadSplit(address, bytes);
        if (bytes > claim.MaxSize || address.Value + (ulong)bytes > claim.End)
            return ReadSplit(address, bytes);
        ulong offset = address.Value - claim.Start;
        if (bytes >= claim.MinSize)
            return claim.Device.Read(offset, size) & Mask(bytes);
        ulong unit = offset & ~(ulong)(claim.MinSize - 1);
        int shift = (int)(offset - unit) * 8;
        ulong value = claim.Device.Read(unit, (AccessSize)claim.MinSize) >> shift;
        return value & Mask(bytes);
    }

    public void Write(Gpa address, AccessSize size, ulong value)
    {
        int bytes = (int)size;
        value &= Mask(bytes);
        if (!TryFind(address.Value, out Claim claim))
        {
            if (bytes > 1 && Straddles(address.Value, bytes))
                WriteSplit(address, bytes, value);
            return;
        }
        if (bytes > claim.MaxSize || address.Value + (ulong)bytes > claim.End)
        {
            WriteSplit(address, bytes, value);
            return;
        }
        ulong offset = address.Value - claim.Start;
        if (bytes >= claim.MinSize)
        {
            claim.Device.Write(offset, size, value);
            return;
        }
        ulong unit = offset & ~(ulong)(claim.MinSize - 1);
        claim.Device.Write(unit, (AccessSize)claim.MinSize, value << (int)(offset - unit) * 8);
    }

    private static ulong Mask(int bytes) => bytes == 8 ? ulong.MaxValue : (1ul << bytes * 8) - 1;

    private ulong ReadSplit(Gpa address, int bytes)
    {
        int half = bytes / 2;
        return Read(address, (AccessSize)half) | Read(address + (ulong)half, (AccessSize)half) << half * 8;
    }

    private void WriteSplit(Gpa address, int bytes, ulong value)
    {
        int half = bytes / 2;
        Write(address, (AccessSize)half, value);
        Write(address + (ulong)half, (AccessSize)half, value >> half * 8);
    }

    /// <summary>Whether a later byte of an access that starts outside every region lies in one.</summary>
    private bool Straddles(ulong address, int bytes) => TryFind(address + (ulong)bytes - 1, out _);

    private bool TryFind(ulong address, out Claim claim) => AddressRegions.TryFind<Claim>(_claims, address, out claim);
}
