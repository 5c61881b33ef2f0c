using System;
using System.Threading;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>CMPXCHG8B and CMPXCHG16B, locked or not: always one atomic access where the operand lies in one page.</summary>
internal static unsafe class WideCompareExchange
{
    private const int Rax = 0;
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rbx = 3;

    private static readonly delegate* unmanaged[SuppressGCTransition]<byte*, ulong*, ulong*, uint> Exchange16 =
        (delegate* unmanaged[SuppressGCTransition]<byte*, ulong*, ulong*, uint>)ThunkCache.Make(compiler => compiler.CompileCompareExchange16());

    public static Op* Eight(VcpuBlock* s, Op* op)
    {
        byte* memory = Access.Modify(s, Access.Linear(s, op, 8, write: true), 8, locked: (op->Flags & OpFlags.Lock) != 0);
        if (memory == null)
            return Access.Fault(s, op);
        ulong expected = (uint)s->Gpr[Rax] | s->Gpr[Rdx] << 32;
        ulong value = (uint)s->Gpr[Rbx] | s->Gpr[Rcx] << 32;
        ulong found = Interlocked.CompareExchange(ref *(ulong*)memory, value, expected);
        Access.Commit(s);
        bool equal = found == expected;
        if (!equal)
        {
            s->Gpr[Rax] = (uint)found;
            s->Gpr[Rdx] = found >> 32;
        }
        LazyFlags.SetZero(s, equal);
        return op + 1;
    }

    public static Op* Sixteen(VcpuBlock* s, Op* op)
    {
        ulong linear = Access.Linear(s, op, 16, write: true);
        if ((linear & 15) != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        byte* memory = Access.Modify(s, linear, 16, locked: (op->Flags & OpFlags.Lock) != 0);
        if (memory == null)
            return Access.Fault(s, op);
        ulong* expected = stackalloc ulong[2];
        ulong* value = stackalloc ulong[2];
        expected[0] = s->Gpr[Rax];
        expected[1] = s->Gpr[Rdx];
        value[0] = s->Gpr[Rbx];
        value[1] = s->Gpr[Rcx];
        bool equal = TryExchange16(memory, expected, value);
        Access.Commit(s);
        if (!equal)
        {
            s->Gpr[Rax] = expected[0];
            s->Gpr[Rdx] = expected[1];
        }
        LazyFlags.SetZero(s, equal);
        return op + 1;
    }

    /// <summary>Compares and exchanges 16 aligned bytes atomically. What was there is left in <paramref name="expected"/>.</summary>
    public static bool TryExchange16(byte* place, ulong* expected, ulong* value)
    {
        // The scratch area for MMIO need not be aligned, and only this thread sees it.
        if (((nint)place & 15) == 0)
            return Exchange16(place, expected, value) != 0;
        Span<ulong> memory = new(place, 2);
        bool equal = memory[0] == expected[0] && memory[1] == expected[1];
        expected[0] = memory[0];
        expected[1] = memory[1];
        if (equal)
        {
            memory[0] = value[0];
            memory[1] = value[1];
        }
        return equal;
    }
}
