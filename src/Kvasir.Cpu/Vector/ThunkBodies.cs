using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>What surrounds the call of a thunk, as a type argument of handlers.</summary>
internal unsafe interface IBody
{
    /// <summary>False: a fault was recorded and nothing else changed.</summary>
    static abstract bool Run(VcpuBlock* s, Op* op, byte* memory);
}

/// <summary>Registers and memory alone.</summary>
internal unsafe struct Plain : IBody
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        Thunks.Call(s, memory, op);
        return true;
    }
}

/// <summary>Writes all arithmetic flags and depends on none.</summary>
internal unsafe struct SetsFlags : IBody
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        LazyFlags.SetArithmetic(s, Thunks.UnpackFlags(Thunks.Call(s, memory, op)));
        return true;
    }
}

/// <summary>Reads flags, or leaves some of them undefined: what the host makes of them depends on what they were.</summary>
internal unsafe struct ChangesFlags : IBody
{
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        Thunks.PackFlags(s);
        LazyFlags.SetArithmetic(s, Thunks.UnpackFlags(Thunks.Call(s, memory, op)));
        return true;
    }
}

/// <summary>Reads flags and leaves them as they are (FCMOVcc).</summary>
internal unsafe struct UsesFlags : IBody
{
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        Thunks.PackFlags(s);
        Thunks.Call(s, memory, op);
        return true;
    }
}

/// <summary>Floating-point arithmetic.</summary>
internal unsafe struct FloatArithmetic : IBody
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        if (!FloatingPoint.IsDefault(s))
            return FloatingPoint.CallSlow(s, op, memory, out _);
        Thunks.Call(s, memory, op);
        return true;
    }
}

/// <summary>Floating-point comparisons that set flags.</summary>
internal unsafe struct FloatComparison : IBody
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        uint flags;
        if (FloatingPoint.IsDefault(s))
            flags = Thunks.Call(s, memory, op);
        else if (!FloatingPoint.CallSlow(s, op, memory, out flags))
            return false;
        LazyFlags.SetArithmetic(s, Thunks.UnpackFlags(flags));
        return true;
    }
}

/// <summary>MMX: the x87 stack becomes the MMX registers.</summary>
internal unsafe struct MmxPlain : IBody
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        X87State.EnterMmx(s);
        Thunks.Call(s, memory, op);
        return true;
    }
}

/// <summary>Conversions between MMX and floating point.</summary>
internal unsafe struct MmxFloatArithmetic : IBody
{
    public static bool Run(VcpuBlock* s, Op* op, byte* memory)
    {
        // The transition happens even where the conversion raises an exception.
        X87State.EnterMmx(s);
        if (!FloatingPoint.IsDefault(s))
            return FloatingPoint.CallSlow(s, op, memory, out _);
        Thunks.Call(s, memory, op);
        return true;
    }
}
