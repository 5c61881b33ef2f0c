using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Makes of a guest instruction the one that a thunk executes: 64-bit code, canonical registers, memory through one pointer.</summary>
internal static class HostForm
{
    public static Instruction Of(in Instruction guest)
    {
        Instruction host = guest;
        host.CodeSize = CodeSize.Code64;
        host.SegmentPrefix = Register.None;
        host.HasRepePrefix = false;
        host.HasRepnePrefix = false;
        for (int i = 0; i < guest.OpCount; i++)
        {
            switch (guest.GetOpKind(i))
            {
                case OpKind.Register:
                    host.SetOpRegister(i, Canonical(guest.GetOpRegister(i), i));
                    break;
                case OpKind.Memory:
                    host.MemoryBase = ThunkLayout.Memory;
                    host.MemoryIndex = Register.None;
                    host.MemoryIndexScale = 1;
                    host.MemoryDisplacement64 = 0;
                    host.MemoryDisplSize = 0;
                    break;
                default:
                    break;
            }
        }
        return host;
    }

    /// <summary>The byte by which a thunk finds a register operand in the vCPU's block: see <see cref="ThunkCompiler"/>.</summary>
    public static byte Place(Register register)
    {
        if (register.IsXMM())
            return (byte)((register - Register.XMM0) * 4);
        if (register.IsYMM())
            return (byte)((register - Register.YMM0) * 4);
        return register.IsMM() ? (byte)((register - Register.MM0) * 2) : Operands.Register(register);
    }

    private static Register Canonical(Register register, int operand)
    {
        if (register.IsXMM())
            return Register.XMM0 + ThunkLayout.FirstVector + operand;
        if (register.IsYMM())
            return Register.YMM0 + ThunkLayout.FirstVector + operand;
        if (register.IsMM())
            return Register.MM0 + ThunkLayout.FirstVector + operand;
        return register.IsGPR() ? ThunkLayout.General(operand, register.GetSize()) : register;
    }
}
