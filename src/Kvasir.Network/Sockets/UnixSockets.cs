using System.IO;
using System.Net.Sockets;
using Kvasir.Linux;

namespace Kvasir.Network.Sockets;

/// <summary>Paths of listening Unix sockets.</summary>
internal static class UnixSockets
{
    /// <summary>Removes a socket that a killed VM may have left behind.</summary>
    /// <exception cref="NetworkException">Another process has it.</exception>
    public static void RemoveStale(string path, SocketType type)
    {
        if (!FileStatus.IsSocket(path))
            return;
        using Socket probe = new(AddressFamily.Unix, type, ProtocolType.Unspecified);
        try
        {
            probe.Connect(new UnixDomainSocketEndPoint(path));
        }
        catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionRefused)
        {
            File.Delete(path);
            return;
        }
        throw new NetworkException($"{path}: another process has this socket");
    }
}
