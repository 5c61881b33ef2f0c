using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// x87 instructions that run as the host's own. <see cref="Op.Imm"/> is the thunk, <see cref="Op.R0"/> the memory operand's size;
/// <see cref="Op.Aux"/> holds the 11-bit opcode and, from bit 12, the segment of the memory operand.
/// </summary>
internal static unsafe class X87Handlers
{
    private const int SegmentShift = 12;
    private const ushort OpcodeMask = 0x7ff;

    /// <summary>Exceptions that leave the destination of a store untouched where they are unmasked: all but an inexact result.</summary>
    private const ushort StorePreventing = 0x1f;

    /// <summary>What <see cref="Op.Aux"/> holds for the handlers below.</summary>
    public static ushort Aux(ushort opcode, int segment) => (ushort)((opcode & OpcodeMask) | segment << SegmentShift);

    public static ushort OpcodeOf(Op* op) => (ushort)(op->Aux & OpcodeMask);

    public static int SegmentOf(Op* op) => op->Aux >> SegmentShift;

    /// <summary>Registers only; <typeparamref name="TBody"/> says which part the arithmetic flags have.</summary>
    public static Op* Registers<TBody>(VcpuBlock* s, Op* op)
        where TBody : struct, IBody
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        Run<TBody>(s, op, null);
        NoteInstruction(s, op);
        X87State.MirrorPointers(s);
        return op + 1;
    }

    public static Op* Load(VcpuBlock* s, Op* op)
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        byte* memory = Access.Read(s, Access.Linear(s, op, op->R0, write: false), op->R0);
        if (memory == null)
            return Access.Fault(s, op);
        Run<Plain>(s, op, memory);
        NoteInstruction(s, op);
        NoteOperand(s, op);
        X87State.MirrorPointers(s);
        return op + 1;
    }

    public static Op* Store(VcpuBlock* s, Op* op)
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        byte* memory = Access.Overwrite(s, Access.Linear(s, op, op->R0, write: true), op->R0);
        if (memory == null)
            return Access.Fault(s, op);
        if (Run<Plain>(s, op, memory))
            Access.Commit(s);
        else
            s->StorePending = false;
        NoteInstruction(s, op);
        NoteOperand(s, op);
        X87State.MirrorPointers(s);
        return op + 1;
    }

    /// <summary>Runs the thunk. False: an unmasked exception kept a store from happening.</summary>
    private static bool Run<TBody>(VcpuBlock* s, Op* op, byte* memory)
        where TBody : struct, IBody
    {
        ushort ignored = 0;
        if (X87State.IsPending(s))
        {
            // IGNNE# lets the instruction run over a pending exception, which the host's FPU would report.
            ignored = (ushort)(X87State.Status(s) & X87State.Exceptions);
            X87State.SetStatus(s, (ushort)(X87State.Status(s) & ~X87State.Exceptions));
        }
        TBody.Run(s, op, memory);
        bool stored = (X87State.Status(s) & ~X87State.Control(s) & StorePreventing) == 0;
        if (ignored != 0)
            X87State.SetStatus(s, (ushort)(X87State.Status(s) | ignored));
        return stored;
    }

    /// <summary>The last-instruction pointer and opcode (Intel SDM vol. 1, "x87 FPU Instruction and Data (Operand) Pointers").</summary>
    private static void NoteInstruction(VcpuBlock* s, Op* op)
    {
        s->FpuIp = Access.CurrentRip(s, op);
        s->FpuCs = HostFeatures.SelectorsDeprecated ? (ushort)0 : s->SegSelector[1];
        // Intel's processors keep the opcode of instructions with an unmasked exception only.
        if (HostFeatures.IsAmd || X87State.IsPending(s))
            s->FpuOpcode = OpcodeOf(op);
    }

    private static void NoteOperand(VcpuBlock* s, Op* op)
    {
        if (HostFeatures.DataPointerOnExceptionOnly && !X87State.IsPending(s))
            return;
        s->FpuDp = Access.CutOffset(op->Address, Access.Offset(s, op));
        s->FpuDs = HostFeatures.SelectorsDeprecated ? (ushort)0 : s->SegSelector[SegmentOf(op)];
    }
}
