using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace Kvasir.Cpu;

/// <summary>Work that waits for a vCPU at its next block boundary. Any thread may set bits, atomically.</summary>
[System.Flags]
public enum PendingWork
{
    None = 0,

    /// <summary>The local APIC may have an interrupt.</summary>
    Interrupt = 1 << 0,
    Nmi = 1 << 1,
    Init = 1 << 2,
    Sipi = 1 << 3,
    Smi = 1 << 4,

    /// <summary>Come back to the caller of Run.</summary>
    Kick = 1 << 5,

    /// <summary>Another vCPU waits until no vCPU executes guest code.</summary>
    Exclusive = 1 << 6,

    /// <summary>Set by the vCPU itself: leave the block loop and look at the mode, shadow or breakpoint state.</summary>
    Resynchronize = 1 << 7,
}

/// <summary>
/// One vCPU's state in native memory, where handlers reach it by one pointer and emitted code by fixed offsets. The general registers come
/// first so that a byte offset in an operation names any of them, their high bytes included.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public unsafe struct VcpuBlock
{
    /// <summary>Byte offset of <see cref="Zero"/>: the base or index of an operand that has none.</summary>
    public const byte ZeroOffset = 128;

    /// <summary>Byte offset of <see cref="BlockRip"/>: the base of a RIP-relative operand.</summary>
    public const byte BlockRipOffset = 136;

    /// <summary>How many groups of accesses translated code keeps at once.</summary>
    public const int GroupSlots = 6;

    /// <summary>Bytes of one YMM register.</summary>
    public const int VectorStride = 32;

    // General registers: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.
    public fixed ulong Gpr[16];
    public ulong Zero;

    /// <summary>RIP of the first instruction of the block that runs.</summary>
    public ulong BlockRip;

    // What translated code uses all the time: these fields lie where an 8-bit displacement reaches them (see Layout).

    /// <summary>Host addresses that translated code keeps for groups of accesses.</summary>
    public fixed ulong Groups[GroupSlots];

    /// <summary>Software TLB of the current privilege and address space.</summary>
    public TlbEntry* ReadTlb;
    public TlbEntry* WriteTlb;

    /// <summary>RIP of the byte at the start of the memory page that holds the running block: a block's RIP is this plus its offset in the page.</summary>
    public ulong CodeBase;

    /// <summary>Arithmetic flags that translated code has not computed: see <see cref="DeferredFlags"/>.</summary>
    public ulong FlagA;
    public ulong FlagB;

    /// <summary>Kind and width of the deferred flags; 0: <see cref="LazyResult"/> and <see cref="LazyAux"/> hold the flags.</summary>
    public byte FlagKind;

    /// <summary>CF (0 or 1) beside a deferred INC or DEC, which leave it alone.</summary>
    public byte FlagCarry;

    /// <summary>Which vector registers the host's hold while translated code runs: see <see cref="VectorCode"/>.</summary>
    public byte VectorLive;

    /// <summary>The translations that accesses to the guest's stack used last: see <see cref="StackCache"/>.</summary>
    public TlbEntry StackWrite;
    public TlbEntry StackRead;

    /// <summary>The stack of return addresses on the host's stack (see <see cref="ReturnStack"/>): where it is full, and where it is empty.</summary>
    public byte* ReturnLimit;

    /// <summary>Work for the next block boundary: <see cref="PendingWork"/> bits.</summary>
    public int Pending;

    /// <summary>CPL 0-3; 3 in virtual-8086 mode, 0 in real mode.</summary>
    public uint Cpl;

    // Segments, in encoding order ES, CS, SS, DS, FS, GS; entry 6 is the flat segment of 64-bit mode.
    public fixed ulong SegBase[8];

    // The fields from here on are farther away.
    public byte* ReturnBottom;

    /// <summary>RIP of the next instruction whenever no block runs, and of the faulting one after a fault.</summary>
    public ulong Rip;

    // Arithmetic flags in lazy form: see LazyFlags.
    public ulong LazyResult;
    public uint LazyAux;

    /// <summary>Jump cache and its current key (address space generation, mode, privilege).</summary>
    public JumpEntry* JumpCache;
    public ulong JumpKey;

    /// <summary>RFLAGS without the arithmetic flags; bit 1 set.</summary>
    public ulong SystemFlags;

    /// <summary>The local APIC may have an interrupt that was looked for and not taken: STI makes it heard.</summary>
    public bool InterruptWaiting;

    /// <summary>Which kind of code runs: <see cref="CodeMode"/>; part of a block's key.</summary>
    public uint Mode;

    /// <summary>Offset + size of a read at most this passes at once; 0 sends every access to the exact check.</summary>
    public fixed ulong SegReadEnd[8];
    public fixed ulong SegWriteEnd[8];
    public fixed uint SegLimit[8];

    /// <summary><see cref="X86.SegmentAttributes"/>.</summary>
    public fixed uint SegAttributes[8];
    public fixed ushort SegSelector[8];

    // The fault that a handler reported: valid while FaultVector is not NoFault.
    public ulong FaultAddress;
    public uint FaultError;
    public byte FaultVector;
    public bool FaultHasError;

    /// <summary>The segment check of an operand failed before its address reached the TLB: 0, or the vector to raise (#SS or #GP).</summary>
    public byte SegmentFault;

    /// <summary>The fault is a non-canonical address: #SS rather than #GP where the operand's segment is SS.</summary>
    public bool FaultNonCanonical;

    /// <summary>A read-modify-write or wide store is not done until <see cref="Access.Commit"/>: it went to <see cref="Scratch"/>, or to a page with code.</summary>
    public bool StorePending;

    /// <summary>The pending store changed memory directly: only decoded code must hear of it.</summary>
    public bool StoreDirect;

    /// <summary>The pending store holds every other vCPU still (a locked operand across pages).</summary>
    public bool StoreExclusive;

    /// <summary>Software TLB of instruction fetches.</summary>
    public TlbEntry* FetchTlb;

    // Where translated code keeps what concerns the host.

    /// <summary>The host's stack pointer in translated code.</summary>
    public ulong HostStack;

    /// <summary>What leaving translated code returns: the operation to go on with, or null.</summary>
    public Op* ExitOp;

    /// <summary>Start of the memory that operations lie in.</summary>
    public byte* OpBase;

    /// <summary>A value that translated code keeps for a moment.</summary>
    public ulong Spare;

    /// <summary>Where translated code goes on after an operation that its handler executed, with what in T1, and whether the host's flags are to be the guest's: see <see cref="CodeSite"/>.</summary>
    public byte* Resume;
    public ulong ResumeT1;
    public bool ReloadFlags;

    /// <summary>Write translations were dropped while an operation was given to its handler: host addresses that translated code kept are no good.</summary>
    public bool TlbChanged;

    /// <summary>What page walks by translated code need.</summary>
    public WalkContext Walk;

    /// <summary>Instructions retired, counted by blocks.</summary>
    public ulong Retired;

    /// <summary>Operations that translated code gave to their handlers.</summary>
    public ulong SlowOperations;

    /// <summary>GCHandle of the owning <see cref="SoftVcpu"/>.</summary>
    public nint Owner;

    // Control registers and what follows from them.
    public ulong Cr0;
    public ulong Cr2;
    public ulong Cr3;
    public ulong Cr4;
    public ulong Efer;
    public ulong Xcr0;

    /// <summary>Where a store that is pending goes: linear address and size in bytes.</summary>
    public ulong StoreAddress;
    public int StoreSize;

    /// <summary>MXCSR of the guest.</summary>
    public uint Mxcsr;

    /// <summary>MXCSR that .NET runs with.</summary>
    public uint HostMxcsr;

    /// <summary>Unused. Its type's alignment puts what follows on a 64-byte boundary, whatever comes before.</summary>
    public Vector512<ulong> Boundary;

    /// <summary>Bytes of an operand that lies in MMIO or across pages, on a 64-byte boundary.</summary>
    public fixed byte Scratch[128];

    /// <summary>YMM0-YMM15, 32 bytes each, on a 64-byte boundary.</summary>
    public fixed byte Vector[16 * VectorStride];

    /// <summary>x87/MMX state as an XSAVE area (legacy region and header) for XSAVE/XRSTOR with only bit 0 of the mask, 64-byte aligned.</summary>
    public fixed byte X87[576];

    /// <summary>Work space of vector thunks.</summary>
    public fixed byte ThunkScratch[256];

    /// <summary>x87 instruction and operand pointers: offsets of the last non-control instruction and of its memory operand.</summary>
    public ulong FpuIp;
    public ulong FpuDp;

    /// <summary>Selectors that belong to <see cref="FpuIp"/> and <see cref="FpuDp"/>, and the instruction's 11-bit opcode.</summary>
    public ushort FpuCs;
    public ushort FpuDs;
    public ushort FpuOpcode;

    /// <summary>Flags given to a thunk: OF in bit 0, the low byte of RFLAGS in bits 8-15.</summary>
    public uint ThunkFlags;
}

/// <summary>
/// What a page walk in host code needs to know (see Stubs.EmitWalk): it does the plain cases of 4-level paging, 4 KiB to 1 GiB pages in RAM whose accessed and dirty
/// bits are set. All else is the MMU's.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public unsafe struct WalkContext
{
    /// <summary>Host address of the top table; 0: host code walks nothing.</summary>
    public ulong Root;

    /// <summary>Bits that every entry on the way must have, for a read and for a write.</summary>
    public ulong ReadNeeds;
    public ulong WriteNeeds;

    /// <summary>Bits that must not be set in every entry on the way: U with SMAP in force.</summary>
    public ulong Forbidden;

    /// <summary>Bits that no entry may have.</summary>
    public ulong Reserved;

    /// <summary>The bits of an entry that are an address.</summary>
    public ulong AddressMask;

    /// <summary>The leaf's bit for global pages, where CR4.PGE lets it count.</summary>
    public ulong GlobalMask;

    /// <summary>Two runs of RAM: first address, bytes, and what to add for the host's address.</summary>
    public ulong Start0;
    public ulong Size0;
    public ulong Host0;
    public ulong Start1;
    public ulong Size1;
    public ulong Host1;

    /// <summary>Multiplier of <see cref="Tlb.UnitHash"/>, and the bits for units with large pages.</summary>
    public ulong UnitHash;
    public byte* LargeUnits;

    /// <summary>Logs of the current TLB, and the numbers of the tables to fill, in a log's form.</summary>
    public int* Log;
    public int* GlobalLog;
    public uint ReadTable;
    public uint WriteTable;

    /// <summary>Of guest memory: host address, flags of its pages, who may write them, and the number of this vCPU there.</summary>
    public byte* Memory;
    public byte* PageFlags;
    public byte* Writers;
    public uint Writer;
    public uint Unused;

    /// <summary>Walks done.</summary>
    public ulong Count;
}

/// <summary>Value of <see cref="VcpuBlock.FaultVector"/> while nothing was raised.</summary>
public static class Fault
{
    public const byte None = 0xff;
}

/// <summary>
/// One translation. <see cref="Tag"/> is the linear page address, <see cref="Host"/> the host's address of the page.
/// </summary>
public unsafe struct TlbEntry
{
    public ulong Tag;
    public byte* Host;

    /// <summary>A tag that no address which selects the entry can have: page 0 selects entry 0 only. Fresh zero memory is nearly an empty table.</summary>
    public static ulong InvalidTag(uint index) => index == 0 ? 0x1000u : 0u;
}

/// <summary>One remembered answer of the block look-up.</summary>
public unsafe struct JumpEntry
{
    public ulong Rip;
    public ulong Key;
    public Op* First;

    /// <summary>Where translated code goes on: the block's translation, or a stub that leaves to the interpreter.</summary>
    public byte* Code;
}

/// <summary>What of the processor mode decides how bytes decode and execute. Bits of a block's key.</summary>
public static class CodeMode
{
    /// <summary>Bits 0-1: operand and address size default: 0 = 16, 1 = 32, 2 = 64.</summary>
    public const uint SizeMask = 3;
    public const uint Code16 = 0;
    public const uint Code32 = 1;
    public const uint Code64 = 2;

    /// <summary>The stack segment's B bit: ESP rather than SP (set in 64-bit mode too).</summary>
    public const uint Stack32 = 4;

    /// <summary>Real or virtual-8086 mode: instructions that need protection raise #UD, segment loads are shifts.</summary>
    public const uint RealOrV86 = 8;

    /// <summary>The code segment's limit can be met: every branch target and fetch is checked against it.</summary>
    public const uint CodeLimited = 16;

    /// <summary>In the key of a block only: its translation checks every access by itself (see <see cref="Translator"/>).</summary>
    public const uint Ungrouped = 128;
}
