using System;
using System.Buffers.Binary;
using System.Text;

namespace Kvasir.Boot;

/// <summary>Little-endian bytes of a firmware table, appended in order or patched by offset.</summary>
internal sealed class TableWriter
{
    private byte[] _bytes = new byte[256];

    public int Length { get; private set; }

    public ReadOnlySpan<byte> Written => _bytes.AsSpan(0, Length);

    public TableWriter U8(byte value)
    {
        Grow(1)[0] = value;
        return this;
    }

    public TableWriter U16(ushort value)
    {
        BinaryPrimitives.WriteUInt16LittleEndian(Grow(2), value);
        return this;
    }

    public TableWriter U32(uint value)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(Grow(4), value);
        return this;
    }

    public TableWriter U64(ulong value)
    {
        BinaryPrimitives.WriteUInt64LittleEndian(Grow(8), value);
        return this;
    }

    public TableWriter Bytes(ReadOnlySpan<byte> value)
    {
        value.CopyTo(Grow(value.Length));
        return this;
    }

    /// <summary>ASCII in a field of fixed width, padded.</summary>
    public TableWriter Text(string value, int width, byte pad = (byte)' ')
    {
        Span<byte> field = Grow(width);
        field.Fill(pad);
        Encoding.ASCII.GetBytes(value.AsSpan(0, Math.Min(value.Length, width)), field);
        return this;
    }

    public TableWriter Zero(int count)
    {
        Grow(count).Clear();
        return this;
    }

    public TableWriter AlignTo(int alignment) => Zero((alignment - Length % alignment) % alignment);

    public void PatchU8(int offset, byte value) => _bytes[offset] = value;

    public void PatchU16(int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(_bytes.AsSpan(offset), value);

    public void PatchU32(int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(_bytes.AsSpan(offset), value);

    public byte[] ToArray() => Written.ToArray();

    /// <summary>What must be added to a range so that its bytes sum to zero.</summary>
    public static byte Checksum(ReadOnlySpan<byte> range)
    {
        byte sum = 0;
        foreach (byte b in range)
            sum += b;
        return (byte)-sum;
    }

    private Span<byte> Grow(int count)
    {
        if (Length + count > _bytes.Length)
            Array.Resize(ref _bytes, Math.Max(_bytes.Length * 2, Length + count));
        Span<byte> added = _bytes.AsSpan(Length, count);
        Length += count;
        return added;
    }
}
