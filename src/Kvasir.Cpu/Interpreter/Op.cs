using System.Runtime.InteropServices;

namespace Kvasir.Cpu;

/// <summary>How an operand's effective address is made from its parts.</summary>
public enum AddressKind : byte
{
    /// <summary>64-bit mode, 64-bit address: no checks but those of the TLB.</summary>
    Long,

    /// <summary>64-bit mode with a 67h prefix: the offset is cut to 32 bits.</summary>
    Long32,

    /// <summary>Legacy and compatibility mode, 32-bit offset: limit and type are checked.</summary>
    Legacy32,

    /// <summary>Legacy and compatibility mode, 16-bit offset.</summary>
    Legacy16,
}

/// <summary>Bits of <see cref="Op.Flags"/>.</summary>
public static class OpFlags
{
    /// <summary>A LOCK prefix, or XCHG with memory.</summary>
    public const ushort Lock = 1;

    /// <summary>REP or REPE.</summary>
    public const ushort Rep = 2;
    public const ushort Repne = 4;

    /// <summary>The memory operand's segment is SS: a non-canonical or out-of-limit address raises #SS, not #GP.</summary>
    public const ushort StackSegment = 8;

    /// <summary>The block is one instruction across two pages (on its first operation).</summary>
    public const ushort CrossesPages = 16;

    /// <summary>Its block's code changed.</summary>
    public const ushort Stale = 32;

    /// <summary>The operation before a block's first instruction: see <see cref="Entry"/>.</summary>
    public const ushort Entry = 64;

    /// <summary>An instruction that does not exist, or not for this guest.</summary>
    public const ushort Undefined = 128;

    /// <summary>Bits 8-11: operand size in bytes (1, 2, 4, 8) where a handler wants it at run time.</summary>
    public const int SizeShift = 8;

    /// <summary>Bits 12-14: address size in bytes (2, 4, 8) for string instructions and the like, as log2.</summary>
    public const int AddressShift = 12;
}

/// <summary>
/// One decoded instruction. Registers are byte offsets into <see cref="VcpuBlock"/>. A handler executes it and returns the operation to go on with:
/// the next one (<c>op + 1</c>), the first of another block, or null to leave the block loop (after a fault, or with
/// <see cref="VcpuBlock.Rip"/> set).
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public unsafe struct Op
{
    public delegate*<VcpuBlock*, Op*, Op*> Handler;

    /// <summary>Immediate operand, sign-extended; a branch's target relative to the block's first byte.</summary>
    public long Imm;

    /// <summary>Displacement, or an absolute offset; relative to the block's first byte for RIP-relative operands. A direct branch keeps its link here.</summary>
    public long Disp;

    /// <summary>First register operand (usually the destination).</summary>
    public byte R0;

    /// <summary>Second register operand.</summary>
    public byte R1;
    public byte Base;
    public byte Index;

    /// <summary>Shift of the index: 0-3.</summary>
    public byte Scale;

    /// <summary>Segment: 0-5, or 6 for the flat one of 64-bit mode.</summary>
    public byte Seg;
    public AddressKind Address;

    /// <summary>Bytes of the instruction.</summary>
    public byte Length;

    /// <summary>Where in the block the instruction starts, in bytes.</summary>
    public ushort Offset;

    /// <summary><see cref="OpFlags"/>.</summary>
    public ushort Flags;

    /// <summary>How many instructions of the block retire with this one: its place in the block, from 1.</summary>
    public ushort Ordinal;

    /// <summary>For the handler's own use: a third register, a condition, a port width.</summary>
    public ushort Aux;
}
