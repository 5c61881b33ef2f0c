namespace Kvasir.Network.Sockets;

/// <summary>How two VMs are linked.</summary>
public enum SocketRole
{
    /// <summary>A stream socket that the other connects to.</summary>
    Listen,

    /// <summary>A stream socket that connects to the other, again and again until it is there.</summary>
    Connect,

    /// <summary>A datagram socket at each end.</summary>
    Datagram,
}

/// <param name="Role">Which end this is.</param>
/// <param name="Path">The Unix socket's path: where it listens, or the other's.</param>
/// <param name="LocalPath">For datagrams: this end's own path.</param>
public sealed record SocketSettings(SocketRole Role, string Path, string LocalPath = "");
