using System;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>Small guests.</summary>
internal static class Programs
{


    /// <summary>Counts in a loop, mixes the count into a sum, and leaves the sum in slot 9. The result is the same on every processor.</summary>
    public static SystemCase Mix(string mode, int rounds)
    {
        SystemBuilder b = mode switch
        {
            "real" => SystemBuilder.Real(),
            "protected" => SystemBuilder.Protected(),
            "long" => SystemBuilder.Long(),
            "ring 3" => SystemBuilder.Long().InUserMode(),
            _ => throw new ArgumentException(mode),
        };
        bool user = mode == "ring 3";
        if (user)
            b.State.Rflags |= 3 << 12;
        ulong at = user ? SystemBuilder.UserCode : SystemBuilder.Program;
        ulong result = user ? SystemBuilder.Scratch : SystemBuilder.Slot(9);
        uint sum = 12345;
        for (int i = rounds; i > 0; i--)
            sum = uint.RotateLeft(sum, 5) * 16777619u ^ (uint)i;
        b.Assemble(at, a =>
        {
            Label again = a.CreateLabel();
            a.mov(ecx, rounds);
            a.mov(eax, 12345);
            a.Label(ref again);
            a.rol(eax, 5);
            a.imul(eax, eax, 16777619);
            a.xor(eax, ecx);
            a.dec(ecx);
            a.jne(again);
            if (mode == "real")
                a.mov(__dword_ptr[(ushort)result], eax);
            else
                a.mov(__dword_ptr[result], eax);
            SystemBuilder.Exit(a);
        });
        return b.Expect("the sum", result, 4, sum).Build($"mix in {mode}");
    }

    /// <summary>A program in ring 0 of long mode.</summary>
    public static SystemBuilder Long(Action<Assembler> program)
    {
        SystemBuilder b = SystemBuilder.Long();
        b.Assemble(SystemBuilder.Program, program);
        return b;
    }
}
