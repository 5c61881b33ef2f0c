using System;
using System.Buffers.Binary;
using System.IO;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Authentication;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using static Kvasir.Block.Nbd.NbdProtocol;

namespace Kvasir.Block.Nbd;

/// <summary>A client's side of the negotiation: greeting, TLS, then options and their replies, one at a time.</summary>
internal sealed class NbdHandshake : IAsyncDisposable
{
    private readonly NbdAddress _address;

    private NbdHandshake(NbdAddress address, Socket socket, Stream stream)
    {
        _address = address;
        Socket = socket;
        Stream = stream;
    }

    public Socket Socket { get; }

    /// <summary>The connection; secured where TLS was asked for.</summary>
    public Stream Stream { get; private set; }

    /// <summary>Connects and exchanges greetings.</summary>
    /// <exception cref="BlockException">Nobody is there, or it speaks another protocol.</exception>
    public static async ValueTask<NbdHandshake> ConnectAsync(NbdAddress address, TlsCredentials? credentials, CancellationToken cancellation)
    {
        UnixDomainSocketEndPoint? path = address.Socket is not null ? NbdAddress.SocketAt(address.Socket) : null;
        Socket socket = path is not null
            ? new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified)
            : new Socket(SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
        try
        {
            if (path is not null)
                await socket.ConnectAsync(path, cancellation).ConfigureAwait(false);
            else
                await socket.ConnectAsync(address.Host!, address.Port, cancellation).ConfigureAwait(false);
        }
        catch (SocketException error)
        {
            socket.Dispose();
            throw new BlockException($"Failed to connect to '{address}': {error.Message}", error);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
        NbdHandshake handshake = new(address, socket, new NetworkStream(socket, ownsSocket: true));
        try
        {
            await handshake.GreetAsync(credentials, cancellation).ConfigureAwait(false);
            return handshake;
        }
        catch (Exception error) when (error is IOException or AuthenticationException)
        {
            await handshake.DisposeAsync().ConfigureAwait(false);
            throw Broken(address, error);
        }
        catch
        {
            await handshake.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    public static BlockException Broken(NbdAddress address, Exception error) => new($"Failed to read data from {address}: {error.Message}", error);

    /// <summary>An export's name and the information that is wanted of it (NBD_OPT_INFO, NBD_OPT_GO).</summary>
    public static byte[] InfoQuery(string export, params ReadOnlySpan<ushort> wanted)
    {
        byte[] name = Encoding.UTF8.GetBytes(export);
        byte[] data = new byte[4 + name.Length + 2 + (2 * wanted.Length)];
        BinaryPrimitives.WriteInt32BigEndian(data, name.Length);
        name.CopyTo(data, 4);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(4 + name.Length), (ushort)wanted.Length);
        for (int i = 0; i < wanted.Length; i++)
            BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(6 + name.Length + (2 * i)), wanted[i]);
        return data;
    }

    /// <summary>An export's name and one context, or all where it is empty (NBD_OPT_SET_META_CONTEXT, NBD_OPT_LIST_META_CONTEXT).</summary>
    public static byte[] ContextQuery(string export, ReadOnlySpan<byte> context)
    {
        byte[] name = Encoding.UTF8.GetBytes(export);
        byte[] data = new byte[4 + name.Length + 4 + (context.IsEmpty ? 0 : 4 + context.Length)];
        BinaryPrimitives.WriteInt32BigEndian(data, name.Length);
        name.CopyTo(data, 4);
        if (!context.IsEmpty)
        {
            BinaryPrimitives.WriteInt32BigEndian(data.AsSpan(4 + name.Length), 1);
            BinaryPrimitives.WriteInt32BigEndian(data.AsSpan(8 + name.Length), context.Length);
            context.CopyTo(data.AsSpan(12 + name.Length));
        }
        return data;
    }

    public ValueTask DisposeAsync() => Stream.DisposeAsync();

    /// <summary>Sends an option and reads the first reply to it.</summary>
    public async ValueTask<(uint Type, byte[] Data)> AskAsync(uint option, ReadOnlyMemory<byte> data, CancellationToken cancellation)
    {
        byte[] message = new byte[16 + data.Length];
        BinaryPrimitives.WriteUInt64BigEndian(message, OptionMagic);
        BinaryPrimitives.WriteUInt32BigEndian(message.AsSpan(8), option);
        BinaryPrimitives.WriteInt32BigEndian(message.AsSpan(12), data.Length);
        data.CopyTo(message.AsMemory(16));
        await Stream.WriteAsync(message, cancellation).ConfigureAwait(false);
        return await ReadReplyAsync(option, cancellation).ConfigureAwait(false);
    }

    public async ValueTask<(uint Type, byte[] Data)> ReadReplyAsync(uint option, CancellationToken cancellation)
    {
        byte[] head = new byte[20];
        await Stream.ReadExactlyAsync(head, cancellation).ConfigureAwait(false);
        uint length = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(16));
        if (BinaryPrimitives.ReadUInt64BigEndian(head) != ReplyMagic || BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(8)) != option || length > LargestOption)
            throw new BlockException("The NBD server broke the protocol in the negotiation", BlockErrno.Io);
        byte[] data = new byte[length];
        await Stream.ReadExactlyAsync(data, cancellation).ConfigureAwait(false);
        return (BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(12)), data);
    }

    private async ValueTask GreetAsync(TlsCredentials? credentials, CancellationToken cancellation)
    {
        byte[] greeting = new byte[18];
        await Stream.ReadExactlyAsync(greeting, cancellation).ConfigureAwait(false);
        if (BinaryPrimitives.ReadUInt64BigEndian(greeting) != InitMagic || BinaryPrimitives.ReadUInt64BigEndian(greeting.AsSpan(8)) != OptionMagic)
            throw new BlockException($"{_address} is no NBD server of the newstyle kind", BlockErrno.NotSupported);
        ushort serverFlags = BinaryPrimitives.ReadUInt16BigEndian(greeting.AsSpan(16));
        if ((serverFlags & FlagFixedNewstyle) == 0)
            throw new BlockException($"{_address} does not speak fixed newstyle", BlockErrno.NotSupported);
        byte[] flags = new byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(flags, (uint)(serverFlags & (FlagFixedNewstyle | FlagNoZeroes)));
        await Stream.WriteAsync(flags, cancellation).ConfigureAwait(false);
        if (_address.Tls || credentials is not null)
            await StartTlsAsync(credentials, cancellation).ConfigureAwait(false);
    }

    private async ValueTask StartTlsAsync(TlsCredentials? credentials, CancellationToken cancellation)
    {
        (uint type, _) = await AskAsync(OptStartTls, default, cancellation).ConfigureAwait(false);
        if (type != RepAck)
            throw new BlockException($"{_address} refuses TLS", BlockErrno.NotSupported);
        SslStream secure = new(Stream);
        Stream = secure;
        await secure.AuthenticateAsClientAsync(
            credentials?.ClientOptions(_address.Host ?? string.Empty) ?? new SslClientAuthenticationOptions { TargetHost = _address.Host ?? "localhost" }, cancellation).ConfigureAwait(false);
    }
}
