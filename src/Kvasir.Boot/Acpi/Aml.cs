using System;
using System.Globalization;
using System.Text;

namespace Kvasir.Boot.Acpi;

/// <summary>Encoded AML: one term or a run of them.</summary>
internal readonly record struct AmlTerm(byte[] Bytes)
{
    public static implicit operator AmlTerm(ulong value) => Aml.Integer(value);
}

/// <summary>
/// Writes ACPI Machine Language (ACPI specification, ch. "ACPI Machine Language (AML) Specification"). Each method gives the encoding of the ASL
/// operator of its name; a table's body is these, nested.
/// </summary>
internal static class Aml
{
    public static AmlTerm Zero => Encoded(0x00);

    public static AmlTerm One => Encoded(0x01);

    public static AmlTerm Ones => Encoded(0xff);

    public static AmlTerm Local(int number) => Encoded((byte)(0x60 + number));

    public static AmlTerm Arg(int number) => Encoded((byte)(0x68 + number));

    /// <summary>A constant in its shortest form.</summary>
    public static AmlTerm Integer(ulong value)
    {
        TableWriter w = new();
        _ = value switch
        {
            0 => w.U8(0x00),
            1 => w.U8(0x01),
            <= byte.MaxValue => w.U8(0x0a).U8((byte)value),
            <= ushort.MaxValue => w.U8(0x0b).U16((ushort)value),
            <= uint.MaxValue => w.U8(0x0c).U32((uint)value),
            _ => w.U8(0x0e).U64(value),
        };
        return new AmlTerm(w.ToArray());
    }

    public static AmlTerm Text(string value) =>
        new(new TableWriter().U8(0x0d).Bytes(Encoding.ASCII.GetBytes(value)).U8(0).ToArray());

    /// <summary>A seven-character EISA or PNP identifier, packed as _HID takes it.</summary>
    public static AmlTerm EisaId(string id)
    {
        if (id.Length != 7)
            throw new ArgumentException($"'{id}' is no EISA identifier", nameof(id));
        uint product = uint.Parse(id.AsSpan(3), NumberStyles.HexNumber, CultureInfo.InvariantCulture);
        uint vendor = ((uint)(id[0] - 0x40) << 10) | ((uint)(id[1] - 0x40) << 5) | (uint)(id[2] - 0x40);
        // The identifier is big endian inside a little-endian double word.
        uint packed = (vendor << 16) | product;
        return Integer(System.Buffers.Binary.BinaryPrimitives.ReverseEndianness(packed));
    }

    public static AmlTerm Path(string path)
    {
        TableWriter w = new();
        WritePath(w, path);
        return new AmlTerm(w.ToArray());
    }

    public static AmlTerm Name(string name, AmlTerm value) => Join([0x08], Path(name).Bytes, value.Bytes);

    public static AmlTerm Scope(string path, params AmlTerm[] terms) => Packaged([0x10], Path(path).Bytes, Sequence(terms));

    public static AmlTerm Device(string name, params AmlTerm[] terms) => Packaged([0x5b, 0x82], Path(name).Bytes, Sequence(terms));

    /// <summary>The processor object of ACPI 1.0 to 5.1, without a P_BLK.</summary>
    public static AmlTerm Processor(string name, byte id) =>
        Packaged([0x5b, 0x83], Path(name).Bytes, new TableWriter().U8(id).U32(0).U8(0).ToArray());

    public static AmlTerm Method(string name, int arguments, bool serialized, params AmlTerm[] terms) =>
        Packaged([0x14], Path(name).Bytes, [(byte)(arguments | (serialized ? 8 : 0))], Sequence(terms));

    public static AmlTerm Package(params AmlTerm[] elements)
    {
        if (elements.Length > byte.MaxValue)
            return Packaged([0x13], Integer((ulong)elements.Length).Bytes, Sequence(elements));
        return Packaged([0x12], [(byte)elements.Length], Sequence(elements));
    }

    public static AmlTerm Buffer(ReadOnlySpan<byte> content) =>
        Packaged([0x11], Integer((ulong)content.Length).Bytes, content.ToArray());

    public static AmlTerm OperationRegion(string name, AmlRegionSpace space, AmlTerm offset, AmlTerm length) =>
        Join([0x5b, 0x80], Path(name).Bytes, [(byte)space], offset.Bytes, length.Bytes);

    /// <summary>Fields of a region, from its first bit on.</summary>
    /// <param name="access">1 byte, 2 word, 3 double word.</param>
    /// <param name="fields">Names and widths in bits; an empty name skips the bits.</param>
    public static AmlTerm Field(string region, byte access, params (string Name, int Bits)[] fields)
    {
        TableWriter w = new();
        foreach ((string name, int bits) in fields)
        {
            if (name.Length == 0)
                w.U8(0);
            else
                w.Text(name, 4, (byte)'_');
            w.Bytes(Length(bits));
        }
        return Packaged([0x5b, 0x81], Path(region).Bytes, [access], w.ToArray());
    }

    public static AmlTerm CreateDwordField(AmlTerm buffer, AmlTerm offset, string name) =>
        Join([0x8a], buffer.Bytes, offset.Bytes, Path(name).Bytes);

    public static AmlTerm Return(AmlTerm value) => Join([0xa4], value.Bytes);

    public static AmlTerm Store(AmlTerm value, AmlTerm target) => Join([0x70], value.Bytes, target.Bytes);

    public static AmlTerm And(AmlTerm a, AmlTerm b, AmlTerm target) => Join([0x7b], a.Bytes, b.Bytes, target.Bytes);

    public static AmlTerm Or(AmlTerm a, AmlTerm b, AmlTerm target) => Join([0x7d], a.Bytes, b.Bytes, target.Bytes);

    public static AmlTerm If(AmlTerm condition, params AmlTerm[] terms) => Packaged([0xa0], condition.Bytes, Sequence(terms));

    public static AmlTerm Else(params AmlTerm[] terms) => Packaged([0xa1], Sequence(terms));

    public static AmlTerm LEqual(AmlTerm a, AmlTerm b) => Join([0x93], a.Bytes, b.Bytes);

    public static AmlTerm Call(string method, params AmlTerm[] arguments) => Join(Path(method).Bytes, Sequence(arguments));

    private static AmlTerm Encoded(byte op) => new([op]);

    private static byte[] Sequence(AmlTerm[] terms)
    {
        TableWriter w = new();
        foreach (AmlTerm term in terms)
            w.Bytes(term.Bytes);
        return w.ToArray();
    }

    private static AmlTerm Join(params byte[][] parts)
    {
        TableWriter w = new();
        foreach (byte[] part in parts)
            w.Bytes(part);
        return new AmlTerm(w.ToArray());
    }

    private static AmlTerm Packaged(byte[] op, params byte[][] parts)
    {
        byte[] body = Join(parts).Bytes;
        // The length counts its own bytes.
        int size = 1;
        while (Length(body.Length + size).Length != size)
            size++;
        return Join(op, Length(body.Length + size), body);
    }

    /// <summary>PkgLength: one byte up to 63, else a low nibble and one to three more bytes.</summary>
    private static byte[] Length(int value) => value switch
    {
        < 1 << 6 => [(byte)value],
        < 1 << 12 => [(byte)(0x40 | (value & 0xf)), (byte)(value >> 4)],
        < 1 << 20 => [(byte)(0x80 | (value & 0xf)), (byte)(value >> 4), (byte)(value >> 12)],
        < 1 << 28 => [(byte)(0xc0 | (value & 0xf)), (byte)(value >> 4), (byte)(value >> 12), (byte)(value >> 20)],
        _ => throw new ArgumentOutOfRangeException(nameof(value)),
    };

    private static void WritePath(TableWriter w, string path)
    {
        int at = 0;
        while (at < path.Length && path[at] is '\\' or '^')
            w.U8((byte)path[at++]);
        string[] segments = path.Length == at ? [] : path[at..].Split('.');
        switch (segments.Length)
        {
            case 0:
                w.U8(0x00);
                break;
            case 1:
                break;
            case 2:
                w.U8(0x2e);
                break;
            default:
                w.U8(0x2f).U8((byte)segments.Length);
                break;
        }
        foreach (string segment in segments)
        {
            if (segment.Length is 0 or > 4)
                throw new ArgumentException($"'{segment}' in '{path}' is no ACPI name", nameof(path));
            w.Text(segment, 4, (byte)'_');
        }
    }
}

/// <summary>Address spaces of an operation region.</summary>
internal enum AmlRegionSpace : byte
{
    SystemMemory = 0,
    SystemIo = 1,
    PciConfig = 2,
}
