using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Kvasir.Boot.Kernels;

/// <summary>A loadable part of an ELF file, with physical addresses.</summary>
/// <param name="Offset">Where its bytes start in the file.</param>
internal readonly record struct ElfSegment(ulong Address, ulong VirtualAddress, int Offset, int FileSize, ulong MemorySize);

/// <summary>An ELF executable for x86, 32 or 64 bits wide (System V ABI, ch. "Object Files"): its segments, its entry, its notes.</summary>
internal sealed class ElfImage
{
    private const int Header32 = 52;
    private const int Header64 = 64;
    private const int Program32 = 32;
    private const int Program64 = 56;
    private const uint LoadType = 1;
    private const uint NoteType = 4;
    private const ushort MachineI386 = 3;
    private const ushort MachineX64 = 62;

    /// <summary>More than any kernel has; what is done for each must not add up.</summary>
    private const int MaximumHeaders = 128;

    private readonly List<ElfSegment> _segments = [];
    private readonly List<(int Offset, int Size, uint Alignment)> _notes = [];

    private ElfImage(bool wide, ulong entry)
    {
        Is64Bit = wide;
        Entry = entry;
    }

    public bool Is64Bit { get; }

    /// <summary>The entry as the file has it: an address of the kernel's own choice, virtual or physical.</summary>
    public ulong Entry { get; }

    public IReadOnlyList<ElfSegment> Segments => _segments;

    /// <summary>The entry's physical address: the segment that holds it as a virtual address tells.</summary>
    public ulong PhysicalEntry
    {
        get
        {
            foreach (ElfSegment segment in _segments)
            {
                if (Entry >= segment.VirtualAddress && Entry - segment.VirtualAddress < segment.MemorySize)
                    return Entry - segment.VirtualAddress + segment.Address;
            }
            return Entry;
        }
    }

    public static bool IsElf(ReadOnlySpan<byte> file) => file.StartsWith("\x7f"u8) && file.Length >= 4 && file[1..4].SequenceEqual("ELF"u8);

    /// <summary>Reads the headers and checks that all they name is in the file.</summary>
    /// <exception cref="BootException">Not an executable for this machine, or damaged.</exception>
    public static ElfImage Read(ReadOnlySpan<byte> file)
    {
        if (file.Length < Header32)
            throw new BootException($"the kernel is truncated: {file.Length} bytes end inside its ELF header");
        bool wide = file[4] switch
        {
            1 => false,
            2 => true,
            byte other => throw new BootException($"the kernel's ELF class {other} is neither 32 nor 64 bits"),
        };
        if (file[5] != 1)
            throw new BootException("the kernel is an ELF file of big-endian byte order, for another machine");
        if (wide && file.Length < Header64)
            throw new BootException($"the kernel is truncated: {file.Length} bytes end inside its ELF header");
        ushort machine = U16(file, 18);
        if (machine is not MachineI386 and not MachineX64)
            throw new BootException($"the kernel is an ELF file for another machine (e_machine {machine}), not for x86");

        ElfImage image = new(wide, wide ? U64(file, 24) : U32(file, 24));
        ulong table = wide ? U64(file, 32) : U32(file, 28);
        int size = U16(file, wide ? 54 : 42);
        int count = U16(file, wide ? 56 : 44);
        int expected = wide ? Program64 : Program32;
        if (count == 0)
            throw new BootException("the kernel is an ELF file without program headers: link it as an executable");
        if (count > MaximumHeaders)
            throw new BootException($"the kernel has {count} ELF program headers, this loader takes {MaximumHeaders}");
        if (size < expected)
            throw new BootException($"the kernel's ELF program headers have {size} bytes, {expected} are needed");
        if (table > (ulong)file.Length || (ulong)size * (ulong)count > (ulong)file.Length - table)
            throw new BootException("the kernel is truncated: its ELF program headers are not in the file");
        for (int i = 0; i < count; i++)
            image.ReadProgramHeader(file, (int)table + i * size);
        return image;
    }

    /// <summary>Looks through the notes.</summary>
    /// <returns>The descriptor of the first note of that name and type, or an empty span.</returns>
    public ReadOnlySpan<byte> FindNote(ReadOnlySpan<byte> file, ReadOnlySpan<byte> name, uint type)
    {
        const int header = 12;
        foreach ((int offset, int size, uint alignment) in _notes)
        {
            ReadOnlySpan<byte> notes = file.Slice(offset, size);
            while (notes.Length >= header)
            {
                ulong nameSize = U32(notes, 0);
                ulong descriptorSize = U32(notes, 4);
                uint noteType = U32(notes, 8);
                ulong descriptor = BootMemory.Align(header + nameSize, alignment);
                ulong end = BootMemory.Align(descriptor + descriptorSize, alignment);
                if (descriptor + descriptorSize > (ulong)notes.Length)
                    break;
                if (noteType == type && notes.Slice(header, (int)nameSize).SequenceEqual(name))
                    return notes.Slice((int)descriptor, (int)descriptorSize);
                notes = end < (ulong)notes.Length ? notes[(int)end..] : [];
            }
        }
        return [];
    }

    /// <summary>Writes all segments to where they belong, and zeroes what a segment has beyond its file's bytes.</summary>
    /// <returns>Where the kernel ends in low RAM, 1 MiB at least.</returns>
    public ulong Load(BootMemory memory, ReadOnlySpan<byte> file)
    {
        ulong end = ChipsetAddresses.OneMiB;
        // All room is kept before anything is written: segments must not overlap, so that what is cleared is bounded by RAM.
        foreach (ElfSegment segment in _segments)
            memory.Reserve("kernel", segment.Address, segment.MemorySize);
        foreach (ElfSegment segment in _segments)
        {
            memory.Write(segment.Address, file.Slice(segment.Offset, segment.FileSize));
            memory.Clear(segment.Address + (ulong)segment.FileSize, segment.MemorySize - (ulong)segment.FileSize);
            if (segment.Address < memory.LowEnd)
                end = Math.Max(end, segment.Address + segment.MemorySize);
        }
        return end;
    }

    private void ReadProgramHeader(ReadOnlySpan<byte> file, int at)
    {
        uint type = U32(file, at);
        if (type is not LoadType and not NoteType)
            return;
        ulong offset = Is64Bit ? U64(file, at + 8) : U32(file, at + 4);
        ulong virtualAddress = Is64Bit ? U64(file, at + 16) : U32(file, at + 8);
        ulong address = Is64Bit ? U64(file, at + 24) : U32(file, at + 12);
        ulong size = Is64Bit ? U64(file, at + 32) : U32(file, at + 16);
        ulong memorySize = Is64Bit ? U64(file, at + 40) : U32(file, at + 20);
        ulong alignment = Is64Bit ? U64(file, at + 48) : U32(file, at + 28);
        if (offset > (ulong)file.Length || size > (ulong)file.Length - offset)
            throw new BootException($"the kernel is truncated: {file.Length} bytes, a segment of {size} bytes should start at {offset}");
        if (type == NoteType)
        {
            _notes.Add(((int)offset, (int)size, alignment == 8 ? 8u : 4u));
            return;
        }
        if (memorySize == 0)
            return;
        if (size > memorySize)
            throw new BootException($"the kernel's segment at 0x{address:x} has {size} bytes in the file and only {memorySize} in memory");
        _segments.Add(new ElfSegment(address, virtualAddress, (int)offset, (int)size, memorySize));
    }

    private static ushort U16(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt16LittleEndian(file[offset..]);

    private static uint U32(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(file[offset..]);

    private static ulong U64(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt64LittleEndian(file[offset..]);
}
