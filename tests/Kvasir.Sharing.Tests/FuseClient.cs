using System;
using System.Buffers.Binary;
using System.Text;

namespace Kvasir.Sharing.Tests;

/// <summary>The guest's side of the protocol, from linux/fuse.h alone.</summary>
internal sealed class FuseClient(FuseServer server)
{
    private readonly byte[] _reply = new byte[FuseServer.MaximumReply];
    private ulong _unique;

    public int Error { get; private set; }

    /// <summary>Sends a request.</summary>
    /// <returns>What follows the answer's header; <see cref="Error"/> is its errno.</returns>
    public byte[] Ask(uint operation, ulong node, params byte[][] arguments)
    {
        byte[] body = [];
        foreach (byte[] argument in arguments)
            body = [.. body, .. argument];
        byte[] request = new byte[40 + body.Length];
        BinaryPrimitives.WriteInt32LittleEndian(request, request.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(request.AsSpan(4), operation);
        BinaryPrimitives.WriteUInt64LittleEndian(request.AsSpan(8), ++_unique);
        BinaryPrimitives.WriteUInt64LittleEndian(request.AsSpan(16), node);
        body.CopyTo(request, 40);
        int length = server.Serve(request, _reply);
        if (length == 0)
        {
            Error = 0;
            return [];
        }
        Xunit.Assert.Equal(length, BinaryPrimitives.ReadInt32LittleEndian(_reply));
        Xunit.Assert.Equal(_unique, BinaryPrimitives.ReadUInt64LittleEndian(_reply.AsSpan(8)));
        Error = -BinaryPrimitives.ReadInt32LittleEndian(_reply.AsSpan(4));
        return _reply[16..length];
    }

    public static byte[] U32(params uint[] values)
    {
        byte[] bytes = new byte[values.Length * 4];
        Buffer.BlockCopy(values, 0, bytes, 0, bytes.Length);
        return bytes;
    }

    public static byte[] U64(params ulong[] values)
    {
        byte[] bytes = new byte[values.Length * 8];
        Buffer.BlockCopy(values, 0, bytes, 0, bytes.Length);
        return bytes;
    }

    public static byte[] Name(string text) => [.. Encoding.UTF8.GetBytes(text), 0];

    public void Initialize() => Ask(26, 0, U32(7, 31, 65536, uint.MaxValue));

    /// <returns>The node, or 0.</returns>
    public ulong Lookup(ulong parent, string name) => Entry(Ask(1, parent, Name(name)));

    public static ulong Entry(byte[] answer) => answer.Length >= 128 ? BinaryPrimitives.ReadUInt64LittleEndian(answer) : 0;

    public (ulong Node, ulong Handle) Create(ulong parent, string name, uint flags = 2, uint mode = 0x81a4)
    {
        byte[] answer = Ask(35, parent, U32(flags, mode, 0, 0), Name(name));
        return answer.Length < 136 ? (0, 0) : (Entry(answer), BinaryPrimitives.ReadUInt64LittleEndian(answer.AsSpan(128)));
    }

    public ulong Open(ulong node, uint flags, bool folder = false)
    {
        byte[] answer = Ask(folder ? 27u : 14u, node, U32(flags, 0));
        return answer.Length < 8 ? 0 : BinaryPrimitives.ReadUInt64LittleEndian(answer);
    }

    public byte[] Read(ulong node, ulong handle, ulong offset, uint size) => Ask(15, node, U64(handle, offset), U32(size, 0), U64(0), U32(0, 0));

    public int Write(ulong node, ulong handle, ulong offset, byte[] data)
    {
        byte[] answer = Ask(16, node, U64(handle, offset), U32((uint)data.Length, 0), U64(0), U32(0, 0), data);
        return answer.Length < 4 ? -1 : BinaryPrimitives.ReadInt32LittleEndian(answer);
    }

    public void Release(ulong node, ulong handle, bool folder = false) => Ask(folder ? 29u : 18u, node, U64(handle), U32(0, 0), U64(0));
}
