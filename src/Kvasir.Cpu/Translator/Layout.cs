using System;

namespace Kvasir.Cpu;

/// <summary>
/// Which host registers translated code uses for what, and displacements of a vCPU's state from the register that points into it. That register points some way
/// in, so that the general registers that no host register holds and the fields after all of them are reached with 8-bit displacements.
/// </summary>
internal static unsafe class Layout
{
    /// <summary>Bytes from the start of the state to where <see cref="State"/> points.</summary>
    public const int Bias = 128 + (10 * 8);

    /// <summary>RBP: the vCPU's state.</summary>
    public const int State = 5;

    /// <summary>R14: address of a memory operand; scratch.</summary>
    public const int T0 = 14;

    /// <summary>R15: scratch.</summary>
    public const int T1 = 15;

    /// <summary>RSP of the host.</summary>
    public const int HostStackPointer = 4;

    /// <summary>Host register of each guest register; -1: it stays in memory. Those that instructions use implicitly keep their numbers.</summary>
    private static readonly sbyte[] HostRegisters = [0, 1, 2, 3, 10, 11, 6, 7, 8, 9, -1, -1, 12, 13, -1, -1];

    public static readonly int Rip = Of(b => (byte*)&b->Rip);
    public static readonly int BlockRip = Of(b => (byte*)&b->BlockRip);
    public static readonly int Pending = Of(b => (byte*)&b->Pending);
    public static readonly int ReadTlb = Of(b => (byte*)&b->ReadTlb);
    public static readonly int WriteTlb = Of(b => (byte*)&b->WriteTlb);
    public static readonly int FetchTlb = Of(b => (byte*)&b->FetchTlb);
    public static readonly int CodeBase = Of(b => (byte*)&b->CodeBase);
    public static readonly int LazyResult = Of(b => (byte*)&b->LazyResult);
    public static readonly int LazyAux = Of(b => (byte*)&b->LazyAux);
    public static readonly int FlagA = Of(b => (byte*)&b->FlagA);
    public static readonly int FlagB = Of(b => (byte*)&b->FlagB);
    public static readonly int FlagKind = Of(b => &b->FlagKind);
    public static readonly int FlagCarry = Of(b => &b->FlagCarry);
    public static readonly int VectorLive = Of(b => &b->VectorLive);
    public static readonly int JumpCache = Of(b => (byte*)&b->JumpCache);
    public static readonly int JumpKey = Of(b => (byte*)&b->JumpKey);
    public static readonly int HostStack = Of(b => (byte*)&b->HostStack);
    public static readonly int StackWrite = Of(b => (byte*)&b->StackWrite);
    public static readonly int StackRead = Of(b => (byte*)&b->StackRead);
    public static readonly int ReturnBottom = Of(b => (byte*)&b->ReturnBottom);
    public static readonly int ReturnLimit = Of(b => (byte*)&b->ReturnLimit);
    public static readonly int ExitOp = Of(b => (byte*)&b->ExitOp);
    public static readonly int OpBase = Of(b => (byte*)&b->OpBase);
    public static readonly int Spare = Of(b => (byte*)&b->Spare);
    public static readonly int Resume = Of(b => (byte*)&b->Resume);
    public static readonly int ResumeT1 = Of(b => (byte*)&b->ResumeT1);
    public static readonly int ReloadFlags = Of(b => (byte*)&b->ReloadFlags);
    public static readonly int Groups = Of(b => (byte*)b->Groups);
    public static readonly int Walk = Of(b => (byte*)&b->Walk);
    public static readonly int SegBase = Of(b => (byte*)b->SegBase);
    public static readonly int SegReadEnd = Of(b => (byte*)b->SegReadEnd);
    public static readonly int SegWriteEnd = Of(b => (byte*)b->SegWriteEnd);
    public static readonly int Vector = Of(b => b->Vector);
    public static readonly int X87 = Of(b => b->X87);
    public static readonly int FpuIp = Of(b => (byte*)&b->FpuIp);
    public static readonly int FpuDp = Of(b => (byte*)&b->FpuDp);
    public static readonly int FpuCs = Of(b => (byte*)&b->FpuCs);
    public static readonly int FpuDs = Of(b => (byte*)&b->FpuDs);
    public static readonly int FpuOpcode = Of(b => (byte*)&b->FpuOpcode);
    public static readonly int SegSelector = Of(b => (byte*)b->SegSelector);
    public static readonly int Mxcsr = Of(b => (byte*)&b->Mxcsr);
    public static readonly int HostMxcsr = Of(b => (byte*)&b->HostMxcsr);
    public static readonly int Xcr0 = Of(b => (byte*)&b->Xcr0);
    public static readonly int Cr0 = Of(b => (byte*)&b->Cr0);
    public static readonly int Cr4 = Of(b => (byte*)&b->Cr4);
    public static readonly int Cpl = Of(b => (byte*)&b->Cpl);
    public static readonly int InterruptWaiting = Of(b => (byte*)&b->InterruptWaiting);
    public static readonly int SystemFlags = Of(b => (byte*)&b->SystemFlags);

    private delegate byte* Field(VcpuBlock* block);

    /// <summary>The host register that holds a guest register, or -1.</summary>
    public static int Host(int guest) => HostRegisters[guest];

    /// <summary>Displacement of a guest register's place in memory.</summary>
    public static int Slot(int guest) => guest * 8 - Bias;

    private static int Of(Field field)
    {
        VcpuBlock block;
        // SAFETY: only the distance between two addresses inside one local is taken.
        return (int)(field(&block) - (byte*)&block) - Bias;
    }
}
