using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>How handlers call thunks. A thunk cannot fault (its memory operand is host memory that was checked) and takes well under a microsecond, so garbage collection may wait for it.</summary>
internal static unsafe class Thunks
{
    /// <summary>Bit of <see cref="Op.Flags"/>: the instruction is VEX-encoded.</summary>
    public const ushort Vex = 1 << 15;

    /// <summary>Bit of <see cref="Op.Flags"/>: a move that wants its operand aligned in every mode. (The bit means REP elsewhere, which these do not have.)</summary>
    public const ushort Strict = OpFlags.Rep;

    /// <summary>Runs the operation's thunk. Gives the flags it captured (see <see cref="UnpackFlags"/>); anything where it captures none.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Call(VcpuBlock* s, byte* memory, Op* op) =>
        ((delegate* unmanaged[SuppressGCTransition]<VcpuBlock*, byte*, Op*, uint>)op->Imm)(s, memory, op);

    /// <summary>RFLAGS' arithmetic flags from what LAHF and SETO left in AX.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong UnpackFlags(uint packed) => (packed >> 8 & 0xff) | (packed & 1) << 11;

    /// <summary>Leaves the guest's arithmetic flags where a thunk that reads them looks.</summary>
    public static void PackFlags(VcpuBlock* s)
    {
        ulong flags = LazyFlags.Arithmetic(s);
        s->ThunkFlags = (uint)((flags & 0xff) << 8 | (flags >> 11 & 1));
    }
}
