using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>How the compiler treats an instruction.</summary>
internal enum InstructionKind
{
    /// <summary>Its handler executes it.</summary>
    Handler,

    /// <summary>Executes as the host's own, registers exchanged, memory through a checked pointer.</summary>
    Native,
    NoOperation,
    Divide,
    Push,
    Pop,
    LeaveFrame,
    Jump,
    JumpIf,
    Call,
    JumpIndirect,
    CallIndirect,
    Return,

    /// <summary>On vector registers.</summary>
    Vector,

    /// <summary>x87, but for the instructions that change its control state.</summary>
    X87,

    /// <summary>JRCXZ, LOOP.</summary>
    CounterJump,
    MultiplyNoFlags,
    BitString,
    PushMemory,
    PushFlags,

    /// <summary>CLI, STI.</summary>
    InterruptFlag,
}

/// <summary>Sorts instructions for the compiler.</summary>
internal static class InstructionKinds
{
    public static InstructionKind Of(in Instruction instruction) => instruction.Mnemonic switch
    {
        Mnemonic.Mov => HasSystemRegister(in instruction) ? InstructionKind.Handler : InstructionKind.Native,
        Mnemonic.Add or Mnemonic.Or or Mnemonic.Adc or Mnemonic.Sbb or Mnemonic.And or Mnemonic.Sub or Mnemonic.Xor or Mnemonic.Cmp or Mnemonic.Test
            or Mnemonic.Inc or Mnemonic.Dec or Mnemonic.Neg or Mnemonic.Not or Mnemonic.Lea or Mnemonic.Xchg or Mnemonic.Xadd or Mnemonic.Cmpxchg
            or Mnemonic.Bswap or Mnemonic.Movzx or Mnemonic.Movsx or Mnemonic.Movsxd or Mnemonic.Imul or Mnemonic.Mul or Mnemonic.Rol or Mnemonic.Ror
            or Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Shld or Mnemonic.Shrd
            or Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc or Mnemonic.Bsf or Mnemonic.Bsr or Mnemonic.Cbw or Mnemonic.Cwde
            or Mnemonic.Cdqe or Mnemonic.Cwd or Mnemonic.Cdq or Mnemonic.Cqo or Mnemonic.Stc or Mnemonic.Clc or Mnemonic.Cmc or Mnemonic.Lahf
            or Mnemonic.Sahf => InstructionKind.Native,
        Mnemonic.Seto or Mnemonic.Setno or Mnemonic.Setb or Mnemonic.Setae or Mnemonic.Sete or Mnemonic.Setne or Mnemonic.Setbe or Mnemonic.Seta
            or Mnemonic.Sets or Mnemonic.Setns or Mnemonic.Setp or Mnemonic.Setnp or Mnemonic.Setl or Mnemonic.Setge or Mnemonic.Setle or Mnemonic.Setg
            or Mnemonic.Cmovo or Mnemonic.Cmovno or Mnemonic.Cmovb or Mnemonic.Cmovae or Mnemonic.Cmove or Mnemonic.Cmovne or Mnemonic.Cmovbe
            or Mnemonic.Cmova or Mnemonic.Cmovs or Mnemonic.Cmovns or Mnemonic.Cmovp or Mnemonic.Cmovnp or Mnemonic.Cmovl or Mnemonic.Cmovge
            or Mnemonic.Cmovle or Mnemonic.Cmovg => InstructionKind.Native,
        Mnemonic.Andn or Mnemonic.Bextr or Mnemonic.Blsi or Mnemonic.Blsr or Mnemonic.Blsmsk or Mnemonic.Bzhi or Mnemonic.Pdep
            or Mnemonic.Pext or Mnemonic.Rorx or Mnemonic.Sarx or Mnemonic.Shlx or Mnemonic.Shrx or Mnemonic.Tzcnt or Mnemonic.Lzcnt
            or Mnemonic.Popcnt or Mnemonic.Crc32 or Mnemonic.Movbe or Mnemonic.Adcx or Mnemonic.Adox or Mnemonic.Movnti
            or Mnemonic.Cmpxchg8b or Mnemonic.Cmpxchg16b or Mnemonic.Lfence or Mnemonic.Mfence or Mnemonic.Sfence => InstructionKind.Native,
        Mnemonic.Mulx => InstructionKind.MultiplyNoFlags,
        Mnemonic.Jrcxz or Mnemonic.Loop => InstructionKind.CounterJump,
        Mnemonic.Pushfq => InstructionKind.PushFlags,
        Mnemonic.Cli or Mnemonic.Sti => InstructionKind.InterruptFlag,
        Mnemonic.Nop or Mnemonic.Pause or Mnemonic.Endbr32 or Mnemonic.Endbr64 or Mnemonic.Reservednop
            or Mnemonic.Prefetchnta or Mnemonic.Prefetcht0 or Mnemonic.Prefetcht1 or Mnemonic.Prefetcht2 or Mnemonic.Prefetch or Mnemonic.Prefetchw => InstructionKind.NoOperation,
        Mnemonic.Div or Mnemonic.Idiv => InstructionKind.Divide,
        Mnemonic.Push => instruction.Op0Kind == OpKind.Memory ? InstructionKind.PushMemory : InstructionKind.Push,
        Mnemonic.Pop => InstructionKind.Pop,
        Mnemonic.Leave => InstructionKind.LeaveFrame,
        Mnemonic.Jmp => instruction.Op0Kind switch
        {
            OpKind.NearBranch16 or OpKind.NearBranch32 or OpKind.NearBranch64 => InstructionKind.Jump,
            OpKind.Register or OpKind.Memory when instruction.Code is Code.Jmp_rm16 or Code.Jmp_rm32 or Code.Jmp_rm64 => InstructionKind.JumpIndirect,
            _ => InstructionKind.Handler,
        },
        Mnemonic.Call => instruction.Op0Kind switch
        {
            OpKind.NearBranch16 or OpKind.NearBranch32 or OpKind.NearBranch64 => InstructionKind.Call,
            OpKind.Register or OpKind.Memory when instruction.Code is Code.Call_rm16 or Code.Call_rm32 or Code.Call_rm64 => InstructionKind.CallIndirect,
            _ => InstructionKind.Handler,
        },
        Mnemonic.Ret => InstructionKind.Return,
        Mnemonic.Jo or Mnemonic.Jno or Mnemonic.Jb or Mnemonic.Jae or Mnemonic.Je or Mnemonic.Jne or Mnemonic.Jbe or Mnemonic.Ja or Mnemonic.Js
            or Mnemonic.Jns or Mnemonic.Jp or Mnemonic.Jnp or Mnemonic.Jl or Mnemonic.Jge or Mnemonic.Jle or Mnemonic.Jg => InstructionKind.JumpIf,
        _ => InstructionKind.Handler,
    };

    /// <summary>The condition of a Jcc, SETcc or CMOVcc by its number in the encoding.</summary>
    public static int ConditionOf(in Instruction instruction) => instruction.ConditionCode switch
    {
        ConditionCode.o => 0,
        ConditionCode.no => 1,
        ConditionCode.b => 2,
        ConditionCode.ae => 3,
        ConditionCode.e => 4,
        ConditionCode.ne => 5,
        ConditionCode.be => 6,
        ConditionCode.a => 7,
        ConditionCode.s => 8,
        ConditionCode.ns => 9,
        ConditionCode.p => 10,
        ConditionCode.np => 11,
        ConditionCode.l => 12,
        ConditionCode.ge => 13,
        ConditionCode.le => 14,
        _ => 15,
    };

    private static bool HasSystemRegister(in Instruction instruction)
    {
        for (int i = 0; i < 2; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register && !instruction.GetOpRegister(i).IsGPR())
                return true;
        }
        return false;
    }
}
