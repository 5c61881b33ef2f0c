using System;
using System.IO;
using System.IO.Compression;
using System.Runtime.InteropServices;

namespace Kvasir.Block.Formats;

/// <summary>One block in a zlib stream of its own (RFC 1950), as VMDK's grains and cloop's blocks are.</summary>
internal static class ZlibBlock
{
    /// <summary>Expands a block; false: damaged, or shorter than asked.</summary>
    public static bool Expand(ReadOnlyMemory<byte> source, Span<byte> target)
    {
        try
        {
            using ZLibStream stream = new(AsStream(source), CompressionMode.Decompress);
            int done = stream.ReadAtLeast(target, target.Length, throwOnEndOfStream: false);
            return done == target.Length;
        }
        catch (InvalidDataException)
        {
            return false;
        }
    }

    /// <summary>Compresses a block.</summary>
    public static byte[] Compress(ReadOnlySpan<byte> source)
    {
        using MemoryStream packed = new();
        using (ZLibStream stream = new(packed, CompressionLevel.Optimal, leaveOpen: true))
            stream.Write(source);
        return packed.ToArray();
    }

    private static MemoryStream AsStream(ReadOnlyMemory<byte> memory) =>
        MemoryMarshal.TryGetArray(memory, out ArraySegment<byte> array) ? new MemoryStream(array.Array!, array.Offset, array.Count, writable: false) : new MemoryStream(memory.ToArray());
}
