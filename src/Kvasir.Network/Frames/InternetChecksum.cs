using System;
using System.Buffers.Binary;
using System.Numerics;
using System.Runtime.InteropServices;

namespace Kvasir.Network.Frames;

/// <summary>The Internet checksum (RFC 1071): the ones' complement sum of 16-bit words.</summary>
public static class InternetChecksum
{
    /// <summary>Adds bytes to a sum. Every piece but the last must have an even length.</summary>
    /// <returns>The sum, folded to 16 bits, in network order.</returns>
    public static ushort Sum(ReadOnlySpan<byte> bytes, uint sum = 0)
    {
        // The sum does not depend on byte order but for one swap at the end, so words are added as the host reads them.
        ulong total = BinaryPrimitives.ReverseEndianness(Fold(sum));
        ReadOnlySpan<byte> rest = bytes;
        if (Vector.IsHardwareAccelerated && rest.Length >= 8 * Vector<byte>.Count)
        {
            Vector<ulong> wide = Vector<ulong>.Zero;
            ReadOnlySpan<Vector<uint>> words = MemoryMarshal.Cast<byte, Vector<uint>>(rest);
            foreach (Vector<uint> word in words)
            {
                Vector.Widen(word, out Vector<ulong> low, out Vector<ulong> high);
                wide += low + high;
            }
            rest = rest[(words.Length * Vector<byte>.Count)..];
            for (int lane = 0; lane < Vector<ulong>.Count; lane++)
                total += (wide[lane] & 0xffff_ffff) + (wide[lane] >> 32);
        }
        ReadOnlySpan<uint> doubles = MemoryMarshal.Cast<byte, uint>(rest);
        foreach (uint word in doubles)
            total += word;
        rest = rest[(doubles.Length * 4)..];
        if (rest.Length >= 2)
        {
            total += MemoryMarshal.Read<ushort>(rest);
            rest = rest[2..];
        }
        if (rest.Length == 1)
            total += rest[0];
        total = (total & 0xffff_ffff) + (total >> 32);
        total = (total & 0xffff_ffff) + (total >> 32);
        return BinaryPrimitives.ReverseEndianness(Fold((uint)total));
    }

    /// <summary>The value for a header's checksum field.</summary>
    public static ushort Compute(ReadOnlySpan<byte> bytes, uint sum = 0) => (ushort)~Sum(bytes, sum);

    /// <summary>Does what <see cref="VnetFlags.NeedsChecksum"/> asks: the field holds the pseudo-header's sum already.</summary>
    /// <returns>False where the positions lie outside the frame.</returns>
    public static bool TryComplete(in VnetHeader header, Span<byte> frame)
    {
        int start = header.ChecksumStart;
        int at = start + header.ChecksumOffset;
        if (at + 2 > frame.Length || start >= frame.Length)
            return false;
        ushort value = Compute(frame[start..]);
        // Zero means "none" in UDP, and both zeros are the same number (RFC 768).
        BinaryPrimitives.WriteUInt16BigEndian(frame[at..], value == 0 ? (ushort)0xffff : value);
        return true;
    }

    private static ushort Fold(uint sum)
    {
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        return (ushort)sum;
    }
}
