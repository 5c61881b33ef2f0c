namespace Kvasir.Cpu;

/// <summary>How arithmetic flags that translated code left uncomputed follow from <see cref="VcpuBlock.FlagA"/> (A) and <see cref="VcpuBlock.FlagB"/> (B).</summary>
internal enum FlagKind : byte
{
    /// <summary>Nothing is deferred.</summary>
    None,

    /// <summary>A holds what LAHF and SETO gave: AH in bits 8-15, OF in bit 0.</summary>
    Packed,

    /// <summary>A is the result of AND, OR, XOR or TEST.</summary>
    Logic,

    /// <summary>A is the result, B the second operand of an addition.</summary>
    Add,

    /// <summary>A and B are the operands of a subtraction or comparison.</summary>
    Compare,

    /// <summary>A is the result, B the second operand of a subtraction.</summary>
    Subtract,

    /// <summary>A is the result of NEG.</summary>
    Negate,

    /// <summary>A is the operand, B the count (masked, not zero) of SHL.</summary>
    ShiftLeft,
    ShiftRight,
    ShiftArithmetic,

    /// <summary>A is the result of INC; CF is in <see cref="VcpuBlock.FlagCarry"/>.</summary>
    Increment,
    Decrement,
}

/// <summary>
/// Flags of translated code, computed when they are wanted: the last instruction that set them leaves operands or its result in memory, which costs
/// less than the flags themselves. <see cref="VcpuBlock.FlagKind"/> is a <see cref="FlagKind"/> times 4 plus the log2 of the width in bytes.
/// </summary>
internal static unsafe class DeferredFlags
{
    /// <summary>The first value of <see cref="VcpuBlock.FlagKind"/> with CF in <see cref="VcpuBlock.FlagCarry"/>: these kinds are the last.</summary>
    public const byte FirstWithCarry = (byte)FlagKind.Increment << 2;

    public static byte Code(FlagKind kind, int bytes) => (byte)((int)kind << 2 | System.Numerics.BitOperations.Log2((uint)bytes));

    /// <summary>Brings the flags into the form that handlers use.</summary>
    public static void ToLazy(VcpuBlock* s)
    {
        byte code = s->FlagKind;
        if (code == 0)
            return;
        s->FlagKind = 0;
        switch (code & 3)
        {
            case 0:
                Compute<W8>(s, (FlagKind)(code >> 2));
                break;
            case 1:
                Compute<W16>(s, (FlagKind)(code >> 2));
                break;
            case 2:
                Compute<W32>(s, (FlagKind)(code >> 2));
                break;
            default:
                Compute<W64>(s, (FlagKind)(code >> 2));
                break;
        }
    }

    /// <summary>The flags as LAHF and SETO give them.</summary>
    public static uint Pack(VcpuBlock* s)
    {
        ToLazy(s);
        ulong flags = LazyFlags.Arithmetic(s);
        return (uint)((flags & 0xff) << 8 | (flags >> 11 & 1));
    }

    private static void Compute<TWidth>(VcpuBlock* s, FlagKind kind)
        where TWidth : struct, IWidth
    {
        ulong a = TWidth.Truncate(s->FlagA);
        ulong b = TWidth.Truncate(s->FlagB);
        switch (kind)
        {
            case FlagKind.Packed:
                LazyFlags.SetArithmetic(s, Thunks.UnpackFlags((uint)s->FlagA));
                break;
            case FlagKind.Logic:
                Logic.Result<TWidth>(s, a);
                break;
            case FlagKind.Add:
                Add.Do<TWidth>(s, TWidth.Truncate(a - b), b);
                break;
            case FlagKind.Compare:
                Subtract.Do<TWidth>(s, a, b);
                break;
            case FlagKind.Subtract:
                Subtract.Do<TWidth>(s, TWidth.Truncate(a + b), b);
                break;
            case FlagKind.Negate:
                Subtract.Do<TWidth>(s, 0, TWidth.Truncate(0 - a));
                break;
            case FlagKind.ShiftLeft:
                ShiftLeft.Do<TWidth>(s, a, (int)s->FlagB);
                break;
            case FlagKind.ShiftRight:
                ShiftRight.Do<TWidth>(s, a, (int)s->FlagB);
                break;
            case FlagKind.ShiftArithmetic:
                ShiftArithmetic.Do<TWidth>(s, a, (int)s->FlagB);
                break;
            case FlagKind.Increment:
                s->LazyAux = (uint)s->FlagCarry << 31;
                Increment.Do<TWidth>(s, TWidth.Truncate(a - 1));
                break;
            case FlagKind.Decrement:
                s->LazyAux = (uint)s->FlagCarry << 31;
                Decrement.Do<TWidth>(s, TWidth.Truncate(a + 1));
                break;
            default:
                break;
        }
    }
}
