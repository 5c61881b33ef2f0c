using System.Runtime.InteropServices;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>A user program's registers, as oracle.c has them (<c>struct state</c>).</summary>
[StructLayout(LayoutKind.Sequential, Size = 1216)]
internal unsafe struct UserState
{
    public const int Fcw = 0;
    public const int Fsw = 2;
    public const int Ftw = 4;
    public const int Fop = 6;
    public const int Fip = 8;
    public const int Fdp = 16;
    public const int MxcsrAt = 24;
    public const int St0 = 32;

    /// <summary>In encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.</summary>
    public fixed ulong Gpr[16];

    /// <summary>Offset in the code segment.</summary>
    public ulong Rip;
    public ulong Flags;

    /// <summary>In encoding order: ES, CS, SS, DS, FS, GS.</summary>
    public fixed ushort Selectors[6];
    public uint Reserved;
    public ulong FsBase;
    public ulong GsBase;
    public fixed ulong Pad[2];

    /// <summary>An FXSAVE64 image; its XMM part is not used.</summary>
    public fixed byte Fx[512];
    public fixed byte Ymm[512];

    public uint Mxcsr
    {
        readonly get
        {
            fixed (byte* p = Fx)
                return *(uint*)(p + MxcsrAt);
        }

        set
        {
            fixed (byte* p = Fx)
                *(uint*)(p + MxcsrAt) = value;
        }
    }
}

/// <summary>One case and what the host made of it, as oracle.c has it (<c>struct record</c>).</summary>
[StructLayout(LayoutKind.Sequential, Size = 4096)]
internal unsafe struct OracleRecord
{
    public const uint NoVector = 0x100;

    /// <summary>The code did not end.</summary>
    public const uint TimedOut = 0x101;

    /// <summary>The place cannot run it, or its exception had no stack to go to.</summary>
    public const uint ShutDown = 0x102;

    /// <summary>Bytes of code, the jump back not counted.</summary>
    public const int MaxCode = 496;
    public const int CodeSpace = 512;
    public const int MaxPatch = 1024;

    public UserState In;
    public UserState Out;
    public uint Vector;
    public uint Error;
    public ulong Cr2;

    /// <summary>Of the data pages where they differ from the pristine ones: <see cref="WindowHash"/>.</summary>
    public ulong Hash;
    public uint CodeLinear;
    public uint CodeLength;

    /// <summary>Where in the window <see cref="Patch"/> goes before the run.</summary>
    public uint PatchLinear;
    public uint PatchLength;

    /// <summary>16, 32 or 64.</summary>
    public uint Mode;

    /// <summary>Bytes of the jump back to the helper, which it leaves behind <see cref="Code"/>: code may read itself.</summary>
    public uint LandingLength;
    public fixed uint Pad[4];
    public fixed byte Code[CodeSpace];
    public fixed byte Patch[MaxPatch];
    public fixed byte Tail[64];
}
