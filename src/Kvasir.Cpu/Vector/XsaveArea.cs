using System;

namespace Kvasir.Cpu;

/// <summary>
/// The layout of FXSAVE and XSAVE images (Intel SDM vol. 1, "Managing State Using the XSAVE Feature Set") and the state components in it. An AVX component
/// follows the header at the same place in the standard and in the compacted format.
/// </summary>
internal static unsafe class XsaveArea
{
    public const int FpuOpcode = 6;
    public const int FpuIp = 8;
    public const int FpuDp = 16;
    public const int Mxcsr = 24;
    public const int MxcsrMaskField = 28;
    public const int St = 32;
    public const int Xmm = 160;

    /// <summary>Where FXSAVE stops writing.</summary>
    public const int LegacyUsed = 416;
    public const int StateBv = 512;
    public const int CompactBv = 520;
    public const int Ymm = 576;
    public const int YmmBytes = 256;
    public const int Size = 832;

    public const ulong ComponentX87 = 1;
    public const ulong ComponentSse = 2;
    public const ulong ComponentAvx = 4;
    public const ulong Compacted = 1ul << 63;

    /// <summary>Bits of MXCSR that may be set.</summary>
    public static uint MxcsrMask { get; } = ReadMxcsrMask();

    /// <summary>Components that differ from their initial state (XINUSE).</summary>
    public static ulong InUse(VcpuBlock* s, int registers)
    {
        ulong inUse = X87State.InUse(s) ? ComponentX87 : 0;
        for (int i = 0; i < registers; i++)
        {
            ulong* register = (ulong*)(s->Vector + i * VcpuBlock.VectorStride);
            if ((register[0] | register[1]) != 0)
                inUse |= ComponentSse;
            if ((register[2] | register[3]) != 0)
                inUse |= ComponentAvx;
        }
        return inUse;
    }

    /// <summary>Writes bytes 0-23 and the eight registers.</summary>
    /// <param name="allPointers">False: as this host does; AMD's processors give the error pointers only while an exception is pending.</param>
    public static void WriteX87(VcpuBlock* s, byte* area, bool allPointers, bool wide = true)
    {
        X87State.TakePointers(s);
        new ReadOnlySpan<byte>(s->X87, FpuOpcode).CopyTo(new Span<byte>(area, FpuOpcode));
        new Span<byte>(area + FpuOpcode, Mxcsr - FpuOpcode).Clear();
        if (allPointers || !HostFeatures.IsAmd || X87State.IsPending(s))
        {
            *(ushort*)(area + FpuOpcode) = s->FpuOpcode;
            *(ulong*)(area + FpuIp) = wide ? s->FpuIp : (uint)s->FpuIp | (ulong)s->FpuCs << 32;
            *(ulong*)(area + FpuDp) = wide ? s->FpuDp : (uint)s->FpuDp | (ulong)s->FpuDs << 32;
        }
        for (int i = 0; i < 8; i++)
        {
            ulong* register = (ulong*)X87State.Register(s, i);
            ulong* to = (ulong*)(area + St + i * 16);
            to[0] = register[0];
            to[1] = (ushort)register[1];
        }
    }

    /// <summary>Takes control, status, tags and registers; the pointers are the caller's.</summary>
    public static void ReadX87(VcpuBlock* s, byte* area)
    {
        *(ushort*)s->X87 = 0;
        X87State.SetControl(s, *(ushort*)area);
        X87State.SetStatus(s, *(ushort*)(area + 2));
        X87State.SetTags(s, area[4]);
        for (int i = 0; i < 8; i++)
        {
            ulong* register = (ulong*)X87State.Register(s, i);
            ulong* from = (ulong*)(area + St + i * 16);
            register[0] = from[0];
            register[1] = (ushort)from[1];
        }
    }

    /// <summary>Takes the pointers of an image as FXRSTOR and XRSTOR do.</summary>
    public static void ReadPointers(VcpuBlock* s, byte* area, bool wide)
    {
        // AMD's processors load the error pointers only with a pending exception, and keep the old ones otherwise.
        if (HostFeatures.IsAmd && !X87State.IsPending(s))
            return;
        ulong ip = *(ulong*)(area + FpuIp);
        ulong dp = *(ulong*)(area + FpuDp);
        s->FpuOpcode = (ushort)(*(ushort*)(area + FpuOpcode) & 0x7ff);
        s->FpuIp = wide ? ip : (uint)ip;
        s->FpuDp = wide ? dp : (uint)dp;
        s->FpuCs = wide || HostFeatures.SelectorsDeprecated ? (ushort)0 : (ushort)(ip >> 32);
        s->FpuDs = wide || HostFeatures.SelectorsDeprecated ? (ushort)0 : (ushort)(dp >> 32);
        X87State.MirrorPointers(s);
    }

    public static void WriteMxcsr(VcpuBlock* s, byte* area)
    {
        *(uint*)(area + Mxcsr) = s->Mxcsr;
        *(uint*)(area + MxcsrMaskField) = MxcsrMask;
    }

    public static void WriteXmm(VcpuBlock* s, byte* area, int registers)
    {
        for (int i = 0; i < registers; i++)
            new ReadOnlySpan<byte>(s->Vector + i * VcpuBlock.VectorStride, 16).CopyTo(new Span<byte>(area + Xmm + i * 16, 16));
    }

    public static void WriteYmm(VcpuBlock* s, byte* area, int registers)
    {
        for (int i = 0; i < registers; i++)
            new ReadOnlySpan<byte>(s->Vector + i * VcpuBlock.VectorStride + 16, 16).CopyTo(new Span<byte>(area + Ymm + i * 16, 16));
    }

    /// <summary>Loads XMM registers from an image, or zeros where there is none.</summary>
    public static void ReadXmm(VcpuBlock* s, byte* area, int registers)
    {
        for (int i = 0; i < registers; i++)
        {
            Span<byte> register = new(s->Vector + i * VcpuBlock.VectorStride, 16);
            if (area == null)
                register.Clear();
            else
                new ReadOnlySpan<byte>(area + Xmm + i * 16, 16).CopyTo(register);
        }
    }

    /// <summary>Loads the upper halves of YMM registers from an image, or zeros where there is none.</summary>
    public static void ReadYmm(VcpuBlock* s, byte* area, int registers)
    {
        for (int i = 0; i < registers; i++)
        {
            Span<byte> register = new(s->Vector + i * VcpuBlock.VectorStride + 16, 16);
            if (area == null)
                register.Clear();
            else
                new ReadOnlySpan<byte>(area + Ymm + i * 16, 16).CopyTo(register);
        }
    }

    /// <summary>The host's own mask, which FXSAVE gives; zero stands for FFBFh (Intel SDM vol. 1, "Guidelines for Writing to the MXCSR Register").</summary>
    private static uint ReadMxcsrMask()
    {
        byte* buffer = stackalloc byte[512 + 64];
        byte* area = (byte*)(((nint)buffer + 63) & ~63);
        *(uint*)(area + MxcsrMaskField) = 0;
        ((delegate* unmanaged[SuppressGCTransition]<byte*, void>)ThunkCache.Make(compiler => compiler.CompileFxsave()))(area);
        uint mask = *(uint*)(area + MxcsrMaskField);
        return mask == 0 ? 0xffbfu : mask;
    }
}
