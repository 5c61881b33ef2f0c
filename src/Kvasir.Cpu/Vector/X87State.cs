using System;
using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>
/// The fields of the x87 state in <see cref="VcpuBlock.X87"/> (the legacy region of an XSAVE area: registers in stack order, abridged tags) and what
/// instructions do to it that need no host FPU.
/// </summary>
internal static unsafe class X87State
{
    public const int Header = 512;
    public const ushort InitialControl = 0x37f;
    public const ushort ErrorSummary = 0x0080;
    public const ushort Busy = 0x8000;
    public const ushort TopMask = 0x3800;
    public const int TopShift = 11;

    /// <summary>IE, DE, ZE, OE, UE, PE.</summary>
    public const ushort Exceptions = 0x3f;
    private const ushort ControlWritable = 0x1f3f;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort Control(VcpuBlock* s) => *(ushort*)s->X87;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort Status(VcpuBlock* s) => *(ushort*)(s->X87 + 2);

    /// <summary>One bit for each physical register, set where it is not empty.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte Tags(VcpuBlock* s) => s->X87[4];

    /// <summary>The 10 bytes of ST(i), 16 bytes apart.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* Register(VcpuBlock* s, int i) => s->X87 + 32 + i * 16;

    /// <summary>An unmasked exception waits to be reported.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool IsPending(VcpuBlock* s) => (Status(s) & ErrorSummary) != 0;

    /// <summary>Sets the control word: reserved bits read as the host's do, bit 6 as one.</summary>
    public static void SetControl(VcpuBlock* s, ushort value)
    {
        *(ushort*)s->X87 = (ushort)((value & ControlWritable) | 0x40);
        SetStatus(s, Status(s));
    }

    /// <summary>Sets the status word; ES and B follow from the exceptions and their masks.</summary>
    public static void SetStatus(VcpuBlock* s, ushort value)
    {
        bool error = (value & ~Control(s) & Exceptions) != 0;
        bool before = IsPending(s);
        if (before)
            TakePointers(s);
        value = (ushort)(value & ~(ErrorSummary | Busy));
        *(ushort*)(s->X87 + 2) = error ? (ushort)(value | ErrorSummary | Busy) : value;
        MarkUsed(s);
        if (error && !before)
            MirrorPointers(s);
        else if (!error && HostFeatures.IsAmd)
            new Span<byte>(s->X87 + XsaveArea.FpuOpcode, XsaveArea.Mxcsr - XsaveArea.FpuOpcode).Clear();
    }

    public static void SetTags(VcpuBlock* s, byte tags)
    {
        s->X87[4] = tags;
        s->X87[5] = 0;
    }

    /// <summary>The saved state is not the initial one: the next XRSTOR must load it.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void MarkUsed(VcpuBlock* s) => *(ulong*)(s->X87 + Header) = 1;

    /// <summary>FNINIT: the registers keep what they hold, but are empty.</summary>
    public static void Initialize(VcpuBlock* s)
    {
        Rotate(s, 0);
        *(ushort*)s->X87 = InitialControl;
        SetStatus(s, 0);
        SetTags(s, 0);
        s->FpuIp = 0;
        s->FpuDp = 0;
        s->FpuCs = 0;
        s->FpuDs = 0;
        s->FpuOpcode = 0;
        new Span<byte>(s->X87 + XsaveArea.FpuOpcode, XsaveArea.Mxcsr - XsaveArea.FpuOpcode).Clear();
    }

    /// <summary>The state of XRSTOR for a component that is in its initial configuration: registers zero too.</summary>
    public static void InitializeAll(VcpuBlock* s)
    {
        Initialize(s);
        new Span<byte>(s->X87 + 32, 128).Clear();
    }

    /// <summary>Whether the state differs from the initial one (XINUSE[0]).</summary>
    public static bool InUse(VcpuBlock* s)
    {
        if (Control(s) != InitialControl || Status(s) != 0 || Tags(s) != 0)
            return true;
        return !HostFeatures.IsAmd && new ReadOnlySpan<byte>(s->X87 + 32, 128).ContainsAnyExcept((byte)0);
    }

    /// <summary>
    /// Puts the instruction and operand pointers into the saved state as the host's own XSAVE would have them there: AMD's processors give them only while an
    /// exception is pending.
    /// </summary>
    public static void MirrorPointers(VcpuBlock* s)
    {
        if (HostFeatures.IsAmd && !IsPending(s))
            return;
        *(ushort*)(s->X87 + XsaveArea.FpuOpcode) = s->FpuOpcode;
        *(ulong*)(s->X87 + XsaveArea.FpuIp) = s->FpuIp;
        *(ulong*)(s->X87 + XsaveArea.FpuDp) = s->FpuDp;
    }

    /// <summary>Takes the pointers back from the saved state where it has them: it may have been loaded as a whole.</summary>
    public static void TakePointers(VcpuBlock* s)
    {
        if (HostFeatures.IsAmd && !IsPending(s))
            return;
        s->FpuOpcode = *(ushort*)(s->X87 + XsaveArea.FpuOpcode);
        s->FpuIp = *(ulong*)(s->X87 + XsaveArea.FpuIp);
        s->FpuDp = *(ulong*)(s->X87 + XsaveArea.FpuDp);
    }

    /// <summary>Before an MMX instruction: TOP becomes 0 and every register valid (Intel SDM vol. 3, "The MMX State and MMX Register Aliasing").</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void EnterMmx(VcpuBlock* s)
    {
        if ((Status(s) & TopMask) != 0)
            Rotate(s, 0);
        s->X87[4] = 0xff;
        MarkUsed(s);
    }

    /// <summary>EMMS.</summary>
    public static void LeaveMmx(VcpuBlock* s)
    {
        EnterMmx(s);
        s->X87[4] = 0;
    }

    /// <summary>TOP changes while the physical registers stay: they are kept in stack order.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static void Rotate(VcpuBlock* s, int newTop)
    {
        int distance = (Status(s) >> TopShift & 7) - newTop;
        if (distance == 0)
            return;
        Span<byte> old = stackalloc byte[128];
        new ReadOnlySpan<byte>(s->X87 + 32, 128).CopyTo(old);
        for (int i = 0; i < 8; i++)
            old.Slice(i * 16, 16).CopyTo(new Span<byte>(s->X87 + 32 + ((i + distance) & 7) * 16, 16));
        *(ushort*)(s->X87 + 2) = (ushort)((Status(s) & ~TopMask) | newTop << TopShift);
    }
}
