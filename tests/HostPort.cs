using System;
using System.Net;
using System.Net.Sockets;
using System.Threading;

namespace Kvasir.Tests;

/// <summary>
/// Ports of this host's loopback for servers that must be told theirs. They lie below those that the kernel gives to whoever asks for any, so that none of these is lost to a
/// socket of another program between the question and the use; and no two tests of a run get the same one.
/// </summary>
internal static class HostPort
{
    private const int First = 10_000;
    private const int End = 32_000;

    private static int s_next = Random.Shared.Next(End - First);

    /// <summary>A port that nobody has, for TCP and UDP.</summary>
    public static int Take()
    {
        while (true)
        {
            int port = First + (Interlocked.Increment(ref s_next) % (End - First));
            if (IsFree(port))
                return port;
        }
    }

    private static bool IsFree(int port)
    {
        try
        {
            IPEndPoint place = new(IPAddress.Loopback, port);
            using Socket stream = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
            using Socket datagram = new(AddressFamily.InterNetwork, SocketType.Dgram, ProtocolType.Udp);
            stream.Bind(place);
            datagram.Bind(place);
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }
}
