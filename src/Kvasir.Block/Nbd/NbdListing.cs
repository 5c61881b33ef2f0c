using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using static Kvasir.Block.Nbd.NbdProtocol;

namespace Kvasir.Block.Nbd;

/// <summary>What a server says of one of its exports.</summary>
/// <param name="Name">The export's name.</param>
/// <param name="Description">A text for people; empty: none.</param>
public sealed record NbdListing(string Name, string Description)
{
    private const int MostExports = 10_000;
    private const int MostContexts = 10_000;

    // In the order of the protocol's transmission flags, bit 1 first.
    private static readonly string[] FlagNames = ["readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero"];

    /// <summary>Size in bytes; null where the server did not tell.</summary>
    public long? Length { get; init; }

    /// <summary>The transmission flags (NBD_FLAG_*).</summary>
    public int Flags { get; init; }

    /// <summary>Smallest, preferred and largest block; null where the server did not tell.</summary>
    public (uint Least, uint Preferred, uint Most)? BlockSizes { get; init; }

    /// <summary>Names of the kinds of block status.</summary>
    public IReadOnlyList<string> Contexts { get; init; } = [];

    /// <summary>The names of the flags that are set.</summary>
    public IEnumerable<string> Features
    {
        get
        {
            for (int i = 0; i < FlagNames.Length; i++)
            {
                if ((Flags & (2 << i)) != 0)
                    yield return FlagNames[i];
            }
        }
    }

    /// <summary>Asks a server for its exports.</summary>
    /// <exception cref="BlockException">It cannot be reached, does not tell, or breaks the protocol.</exception>
    public static async ValueTask<IReadOnlyList<NbdListing>> ReadAsync(NbdAddress address, TlsCredentials? credentials, CancellationToken cancellation = default)
    {
        NbdHandshake handshake = await NbdHandshake.ConnectAsync(address, credentials, cancellation).ConfigureAwait(false);
        await using (handshake.ConfigureAwait(false))
        {
            try
            {
                bool structured = (await handshake.AskAsync(OptStructuredReply, default, cancellation).ConfigureAwait(false)).Type == RepAck;
                List<NbdListing> found = await NamesAsync(handshake, cancellation).ConfigureAwait(false);
                for (int i = 0; i < found.Count; i++)
                {
                    found[i] = await DescribeAsync(handshake, found[i], cancellation).ConfigureAwait(false);
                    if (structured)
                        found[i] = found[i] with { Contexts = await ContextsAsync(handshake, found[i].Name, cancellation).ConfigureAwait(false) };
                }
                await handshake.AskAsync(OptAbort, default, cancellation).ConfigureAwait(false);
                return found;
            }
            catch (IOException error)
            {
                throw NbdHandshake.Broken(address, error);
            }
        }
    }

    private static async ValueTask<List<NbdListing>> NamesAsync(NbdHandshake handshake, CancellationToken cancellation)
    {
        List<NbdListing> found = [];
        (uint type, byte[] reply) = await handshake.AskAsync(OptList, default, cancellation).ConfigureAwait(false);
        while (type == RepServer)
        {
            uint length = reply.Length < 4 ? uint.MaxValue : BinaryPrimitives.ReadUInt32BigEndian(reply);
            if (length > reply.Length - 4)
                throw new BlockException("The NBD server broke the protocol in the list of its exports", BlockErrno.Io);
            if (found.Count == MostExports)
                throw new BlockException($"The NBD server has more than {MostExports} exports");
            found.Add(new NbdListing(Encoding.UTF8.GetString(reply, 4, (int)length), Encoding.UTF8.GetString(reply.AsSpan(4 + (int)length))));
            (type, reply) = await handshake.ReadReplyAsync(OptList, cancellation).ConfigureAwait(false);
        }
        return type == RepAck ? found : throw Refused("the list of its exports", type, reply);
    }

    private static async ValueTask<NbdListing> DescribeAsync(NbdHandshake handshake, NbdListing export, CancellationToken cancellation)
    {
        (uint type, byte[] reply) = await handshake.AskAsync(OptInfo, NbdHandshake.InfoQuery(export.Name, InfoBlockSize, InfoDescription), cancellation).ConfigureAwait(false);
        // An export says each thing once; more than that is no answer that ever ends.
        for (int seen = 0; type == RepInfo; seen++)
        {
            if (seen == 16 || reply.Length < 2)
                throw new BlockException("The NBD server broke the protocol in what it says of an export", BlockErrno.Io);
            export = (BinaryPrimitives.ReadUInt16BigEndian(reply), reply.Length) switch
            {
                (InfoExport, 12) => export with { Length = BinaryPrimitives.ReadInt64BigEndian(reply.AsSpan(2)), Flags = BinaryPrimitives.ReadUInt16BigEndian(reply.AsSpan(10)) },
                (InfoBlockSize, 14) => export with
                {
                    BlockSizes = (BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(2)), BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(6)), BinaryPrimitives.ReadUInt32BigEndian(reply.AsSpan(10))),
                },
                (InfoDescription, > 2) => export with { Description = Encoding.UTF8.GetString(reply.AsSpan(2)) },
                _ => export,
            };
            (type, reply) = await handshake.ReadReplyAsync(OptInfo, cancellation).ConfigureAwait(false);
        }
        // An export that went meanwhile, or a server that does not tell: its name is what is known.
        return export;
    }

    private static async ValueTask<IReadOnlyList<string>> ContextsAsync(NbdHandshake handshake, string export, CancellationToken cancellation)
    {
        List<string> contexts = [];
        (uint type, byte[] reply) = await handshake.AskAsync(OptListMetaContext, NbdHandshake.ContextQuery(export, default), cancellation).ConfigureAwait(false);
        while (type == RepMetaContext)
        {
            if (reply.Length < 4 || contexts.Count == MostContexts)
                throw new BlockException("The NBD server broke the protocol in the list of its metadata contexts", BlockErrno.Io);
            contexts.Add(Encoding.UTF8.GetString(reply.AsSpan(4)));
            (type, reply) = await handshake.ReadReplyAsync(OptListMetaContext, cancellation).ConfigureAwait(false);
        }
        return contexts;
    }

    private static BlockException Refused(string what, uint type, byte[] reason)
    {
        string why = type switch
        {
            RepErrTlsRequired => "it requires TLS",
            RepErrPolicy => "its policy forbids it",
            RepErrUnsupported => "it has none",
            _ => $"error {type & ~RepErrorBit}",
        };
        return new BlockException($"The NBD server refuses {what}: {why}{(reason.Length > 0 ? $" ({Encoding.UTF8.GetString(reason)})" : string.Empty)}", BlockErrno.Invalid);
    }
}
