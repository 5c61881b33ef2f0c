using System;
using System.Threading;

namespace Kvasir.Core;

/// <summary>Who is asked for ports that no device claims: a bus behind a bridge that decodes what nobody else does.</summary>
public interface IPortFallback
{
    /// <returns>False where the access is not its own, as a whole.</returns>
    bool TryReadPort(ushort port, AccessSize size, out uint value);

    /// <returns>False where the access is not its own, as a whole.</returns>
    bool TryWritePort(ushort port, AccessSize size, uint value);
}

/// <summary>
/// The port I/O space: 65,536 byte-wide ports. Look-ups take no lock and allocate nothing; mapping is for start-up and hot-plug.
/// An access wider than a device takes, or one that runs past its ports, is split into smaller ones in ascending order, as an ISA bridge
/// does. Unclaimed ports read as all ones and ignore writes.
/// </summary>
public sealed class PortBus
{
    private const int PageSize = 256;

    private sealed record Claim(IPortDevice Device, int First, int Count, int MaxSize);

    private readonly Lock _mapping = new();
    private readonly Claim?[]?[] _pages = new Claim?[65536 / PageSize][];

    /// <summary>Asked where no device claims the first port of an access; null for none. Set before anything runs.</summary>
    public IPortFallback? Fallback { get; set; }

    /// <summary>Gives <paramref name="count"/> ports from <paramref name="first"/> to a device that takes accesses up to <paramref name="maxSize"/>.</summary>
    /// <exception cref="ArgumentException">A port is claimed already, or the range leaves the port space.</exception>
    public void Map(ushort first, int count, IPortDevice device, AccessSize maxSize = AccessSize.Byte)
    {
        if (count <= 0 || first + count > 65536)
            throw new ArgumentException($"ports {first:x}h+{count} leave the port space");
        lock (_mapping)
        {
            for (int port = first; port < first + count; port++)
            {
                if (Find(port) is not null)
                    throw new ArgumentException($"port {port:x}h is claimed already");
            }
            Claim claim = new(device, first, count, (int)maxSize);
            for (int port = first; port < first + count; port++)
                (_pages[port / PageSize] ??= new Claim?[PageSize])[port % PageSize] = claim;
        }
    }

    /// <summary>Takes back every port in the range; ports without a device are left as they are.</summary>
    public void Unmap(ushort first, int count)
    {
        lock (_mapping)
        {
            for (int port = first; port < first + count && port < 65536; port++)
            {
                Claim?[]? page = _pages[port / PageSize];
                if (page is not null)
                    page[port % PageSize] = null;
            }
        }
    }

    public uint Read(ushort port, AccessSize size)
    {
        Claim? claim = Find(port);
        int bytes = (int)size;
        if (claim is not null && bytes <= claim.MaxSize && port + bytes <= claim.First + claim.Count)
            return claim.Device.ReadPort(port, size) & Mask(bytes);
        if (claim is null && Fallback is { } fallback && fallback.TryReadPort(port, size, out uint value))
            return value & Mask(bytes);
        if (bytes == 1)
            return 0xff;
        int half = bytes / 2;
        uint low = Read(port, (AccessSize)half);
        uint high = Read((ushort)(port + half), (AccessSize)half);
        return low | high << half * 8;
    }

    public void Write(ushort port, AccessSize size, uint value)
    {
        Claim? claim = Find(port);
        int bytes = (int)size;
        value &= Mask(bytes);
        if (claim is not null && bytes <= claim.MaxSize && port + bytes <= claim.First + claim.Count)
        {
            claim.Device.WritePort(port, size, value);
            return;
        }
        if (claim is null && Fallback is { } fallback && fallback.TryWritePort(port, size, value))
            return;
        if (bytes == 1)
            return;
        int half = bytes / 2;
        Write(port, (AccessSize)half, value);
        Write((ushort)(port + half), (AccessSize)half, value >> half * 8);
    }

    private static uint Mask(int bytes) => bytes == 4 ? uint.MaxValue : (1u << bytes * 8) - 1;

    private Claim? Find(int port) => _pages[port / PageSize]?[port % PageSize];
}
