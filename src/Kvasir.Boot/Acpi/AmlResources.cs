namespace Kvasir.Boot.Acpi;

/// <summary>
/// Builds a resource template (ACPI specification, "Resource Data Types for ACPI"): descriptors in order, then the end tag.
/// </summary>
internal sealed class AmlResources
{
    private const byte TypeMemory = 0;
    private const byte TypeIo = 1;
    private const byte TypeBus = 2;

    /// <summary>General flags: minimum and maximum are fixed.</summary>
    private const byte Fixed = 0x0c;

    private readonly TableWriter _descriptors = new();

    /// <summary>I/O ports, 16 address bits decoded.</summary>
    public AmlResources Io(ushort port, byte length)
    {
        _descriptors.U8(0x47).U8(1).U16(port).U16(port).U8(1).U8(length);
        return this;
    }

    /// <summary>One ISA interrupt, edge triggered, active high.</summary>
    public AmlResources Irq(int irq)
    {
        _descriptors.U8(0x22).U16((ushort)(1 << irq));
        return this;
    }

    public AmlResources Dma(int channel)
    {
        _descriptors.U8(0x2a).U8((byte)(1 << channel)).U8(0);
        return this;
    }

    /// <summary>Memory below 4 GiB that does not move.</summary>
    public AmlResources Memory32(ulong start, ulong length, bool writable = true)
    {
        _descriptors.U8(0x86).U16(9).U8((byte)(writable ? 1 : 0)).U32((uint)start).U32((uint)length);
        return this;
    }

    /// <summary>Interrupts by global number.</summary>
    public AmlResources Interrupts(bool edge, bool shared, params uint[] numbers)
    {
        // Consumer; active high in every case.
        byte flags = (byte)(1 | (edge ? 2 : 0) | (shared ? 8 : 0));
        _descriptors.U8(0x89).U16((ushort)(2 + 4 * numbers.Length)).U8(flags).U8((byte)numbers.Length);
        foreach (uint number in numbers)
            _descriptors.U32(number);
        return this;
    }

    /// <summary>Bus numbers that a bridge passes on.</summary>
    public AmlResources BusNumbers(ushort first, ushort last) => Word(TypeBus, 0, first, last);

    /// <summary>I/O ports that a bridge passes on.</summary>
    public AmlResources IoWindow(ushort first, ushort last) => Word(TypeIo, 3, first, last);

    /// <summary>Memory below 4 GiB that a bridge passes on.</summary>
    public AmlResources MemoryWindow32(ulong first, ulong last, bool cacheable = false)
    {
        _descriptors.U8(0x87).U16(23).U8(TypeMemory).U8(Fixed).U8((byte)(cacheable ? 3 : 1));
        _descriptors.U32(0).U32((uint)first).U32((uint)last).U32(0).U32((uint)(last - first + 1));
        return this;
    }

    /// <summary>Memory anywhere that a bridge passes on; cacheable.</summary>
    public AmlResources MemoryWindow64(ulong first, ulong last)
    {
        _descriptors.U8(0x8a).U16(43).U8(TypeMemory).U8(Fixed).U8(3);
        _descriptors.U64(0).U64(first).U64(last).U64(0).U64(last - first + 1);
        return this;
    }

    /// <summary>The template as a buffer, with the end tag (whose checksum of zero stands for none).</summary>
    public AmlTerm End()
    {
        _descriptors.U8(0x79).U8(0);
        return Aml.Buffer(_descriptors.Written);
    }

    private AmlResources Word(byte type, byte typeFlags, ushort first, ushort last)
    {
        _descriptors.U8(0x88).U16(13).U8(type).U8(Fixed).U8(typeFlags);
        _descriptors.U16(0).U16(first).U16(last).U16(0).U16((ushort)(last - first + 1));
        return this;
    }
}
