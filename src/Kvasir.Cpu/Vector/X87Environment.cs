using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// The x87 environment in memory as FSTENV and FSAVE write it: 14 or 28 bytes, in a real-mode or a protected-mode layout (Intel SDM vol. 1,
/// "Saving the x87 FPU's State with FSTENV/FNSTENV and FSAVE/FNSAVE").
/// </summary>
internal static unsafe class X87Environment
{
    private const int Empty = 3;

    public static void Write(VcpuBlock* s, byte* image, bool wide)
    {
        X87State.TakePointers(s);
        bool real = (s->Mode & CodeMode.RealOrV86) != 0;
        uint ip = (uint)s->FpuIp;
        uint dp = (uint)s->FpuDp;
        uint linearIp = ip + ((uint)s->FpuCs << 4);
        uint linearDp = dp + ((uint)s->FpuDs << 4);
        uint opcode = s->FpuOpcode;
        if (wide)
        {
            uint* words = (uint*)image;
            const uint reserved = 0xffff_0000;
            words[0] = reserved | X87State.Control(s);
            words[1] = reserved | X87State.Status(s);
            words[2] = reserved | FullTags(s);
            words[3] = real ? reserved | (linearIp & 0xffff) : ip;
            words[4] = real ? (linearIp >> 16 & 0xffff) << 12 | opcode : s->FpuCs | opcode << 16;
            words[5] = real ? reserved | (linearDp & 0xffff) : dp;
            words[6] = real ? (linearDp >> 16 & 0xffff) << 12 : reserved | s->FpuDs;
            return;
        }
        ushort* halves = (ushort*)image;
        halves[0] = X87State.Control(s);
        halves[1] = X87State.Status(s);
        halves[2] = FullTags(s);
        halves[3] = (ushort)(real ? linearIp : ip);
        halves[4] = real ? (ushort)((linearIp >> 16 & 15) << 12 | opcode) : s->FpuCs;
        halves[5] = (ushort)(real ? linearDp : dp);
        halves[6] = real ? (ushort)((linearDp >> 16 & 15) << 12) : s->FpuDs;
    }

    /// <summary>Loads an environment. The registers must be what they will be: they stay in stack order while TOP changes only for FRSTOR.</summary>
    public static void Read(VcpuBlock* s, byte* image, bool wide, bool registersFollow = false)
    {
        bool real = (s->Mode & CodeMode.RealOrV86) != 0;
        int oldTop = X87State.Status(s) >> X87State.TopShift & 7;
        ushort status;
        ushort tags;
        *(ushort*)s->X87 = 0;
        if (wide)
        {
            uint* words = (uint*)image;
            X87State.SetControl(s, (ushort)words[0]);
            status = (ushort)words[1];
            tags = (ushort)words[2];
            if (real)
            {
                s->FpuIp = (words[3] & 0xffff) | (words[4] >> 12 & 0xffff) << 16;
                s->FpuDp = (words[5] & 0xffff) | (words[6] >> 12 & 0xffff) << 16;
                s->FpuOpcode = (ushort)(words[4] & 0x7ff);
                s->FpuCs = 0;
                s->FpuDs = 0;
            }
            else
            {
                s->FpuIp = words[3];
                s->FpuCs = (ushort)words[4];
                s->FpuOpcode = (ushort)(words[4] >> 16 & 0x7ff);
                s->FpuDp = words[5];
                s->FpuDs = (ushort)words[6];
            }
        }
        else
        {
            ushort* halves = (ushort*)image;
            X87State.SetControl(s, halves[0]);
            status = halves[1];
            tags = halves[2];
            s->FpuIp = halves[3];
            s->FpuDp = halves[5];
            if (real)
            {
                s->FpuIp |= (uint)(halves[4] >> 12) << 16;
                s->FpuDp |= (uint)(halves[6] >> 12) << 16;
                s->FpuOpcode = (ushort)(halves[4] & 0x7ff);
                s->FpuCs = 0;
                s->FpuDs = 0;
            }
            else
            {
                s->FpuCs = halves[4];
                s->FpuDs = halves[6];
            }
        }
        int newTop = status >> X87State.TopShift & 7;
        if (!registersFollow && newTop != oldTop)
            X87State.Rotate(s, newTop);
        X87State.SetStatus(s, status);
        byte abridged = 0;
        for (int i = 0; i < 8; i++)
        {
            if ((tags >> 2 * i & 3) != Empty)
                abridged |= (byte)(1 << i);
        }
        X87State.SetTags(s, abridged);
        X87State.MirrorPointers(s);
    }

    /// <summary>The tag word in full: two bits for each physical register, found from what it holds.</summary>
    public static ushort FullTags(VcpuBlock* s)
    {
        int top = X87State.Status(s) >> X87State.TopShift & 7;
        int full = 0;
        for (int physical = 0; physical < 8; physical++)
        {
            int tag = (X87State.Tags(s) >> physical & 1) == 0 ? Empty : TagOf(X87State.Register(s, (physical - top) & 7));
            full |= tag << 2 * physical;
        }
        return (ushort)full;
    }

    /// <summary>0 valid, 1 zero, 2 special (infinity, NaN, denormal, unsupported).</summary>
    private static int TagOf(byte* register)
    {
        ulong significand = *(ulong*)register;
        int exponent = *(ushort*)(register + 8) & 0x7fff;
        if (exponent == 0)
            return significand == 0 ? 1 : 2;
        return exponent == 0x7fff || significand >> 63 == 0 ? 2 : 0;
    }
}
