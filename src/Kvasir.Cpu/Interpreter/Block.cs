using System.Runtime.InteropServices;

namespace Kvasir.Cpu;

/// <summary>Decoded instructions that run one after the other: a trace from its first byte through untaken branches, inside one page.</summary>
[StructLayout(LayoutKind.Sequential)]
public unsafe struct Block
{
    /// <summary>Offset of the first byte in the memory file, shifted left by 8, and the <see cref="CodeMode"/>.</summary>
    public ulong Key;

    /// <summary>The next block in the same hash bucket.</summary>
    public Block* Next;

    /// <summary>The next block on the same page (of the first byte), and of the second page.</summary>
    public Block* NextOnPage;
    public Block* NextOnSecondPage;
    public Op* First;

    /// <summary>Offset in the memory file of the second page's first byte, or <see cref="NoPage"/>: a block of one instruction that crosses pages.</summary>
    public ulong SecondPage;
    public int Operations;

    /// <summary>Bytes of code covered, from the first on; with a translation of several blocks, to the end of the last.</summary>
    public int Bytes;
    public bool Invalid;

    /// <summary>The translation: code to go on with when <see cref="VcpuBlock.Rip"/> is the block's; null while there is none.</summary>
    public byte* Code;

    /// <summary>The translation's entry for branches from the same page.</summary>
    public byte* LinkEntry;

    /// <summary>Code that leaves to the interpreter at this block.</summary>
    public byte* StaleEntry;

    /// <summary>Bytes of the translation, from <see cref="StaleEntry"/> on.</summary>
    public int CodeBytes;

    /// <summary>The first of the exits of other translations that lead here: see <see cref="TranslatedExit"/>. 0: none.</summary>
    public uint Incoming;

    /// <summary>How many rounds of a loop the translation does at once; 1 for other blocks.</summary>
    public int Rounds;

    /// <summary>The translation executes every instruction by itself: see <see cref="LockStep"/>.</summary>
    public bool Checkable;

    /// <summary>RFLAGS that some instruction leaves undefined.</summary>
    public ulong UndefinedFlags;

    /// <summary>How often checks of groups of accesses failed.</summary>
    public int GroupFailures;

    public const ulong NoPage = ulong.MaxValue;
}
