using System.Threading;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>What is left: carry chains, cache control, fences, plain stores that bypass the cache.</summary>
internal static unsafe class GeneralHandlers
{
    /// <summary>ADCX: adds with CF and changes no other flag. <see cref="Op.R0"/> += <see cref="Op.R1"/>.</summary>
    public static Op* Adcx<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        bool carry = Add<TWidth>(s, op, TWidth.Get((byte*)s + op->R1), LazyFlags.Carry(s));
        LazyFlags.SetCarry(s, carry);
        return op + 1;
    }

    public static Op* AdcxMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* memory = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (memory == null)
            return Access.Fault(s, op);
        bool carry = Add<TWidth>(s, op, TWidth.Get(memory), LazyFlags.Carry(s));
        LazyFlags.SetCarry(s, carry);
        return op + 1;
    }

    /// <summary>ADOX: the same with OF.</summary>
    public static Op* Adox<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        bool carry = Add<TWidth>(s, op, TWidth.Get((byte*)s + op->R1), LazyFlags.Overflow(s));
        LazyFlags.SetCarryOverflow(s, LazyFlags.Carry(s), carry);
        return op + 1;
    }

    public static Op* AdoxMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* memory = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (memory == null)
            return Access.Fault(s, op);
        bool carry = Add<TWidth>(s, op, TWidth.Get(memory), LazyFlags.Overflow(s));
        LazyFlags.SetCarryOverflow(s, LazyFlags.Carry(s), carry);
        return op + 1;
    }

    public static Op* Nothing(VcpuBlock* s, Op* op) => op + 1;

    /// <summary>CLFLUSH, CLFLUSHOPT, CLWB: memory is coherent, but the address is checked as a load's.</summary>
    public static Op* CacheLine(VcpuBlock* s, Op* op) =>
        Access.Read(s, Access.Linear(s, op, 1, write: false), 1) != null ? op + 1 : Access.Fault(s, op);

    /// <summary>MFENCE, SFENCE and LFENCE: guest memory is accessed by ordinary loads and stores, so one full fence does for each.</summary>
    public static Op* Fence(VcpuBlock* s, Op* op)
    {
        Interlocked.MemoryBarrier();
        return op + 1;
    }

    /// <summary>MOVNTI.</summary>
    public static Op* Store<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* memory = Access.Overwrite(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (memory == null)
            return Access.Fault(s, op);
        TWidth.Put(memory, TWidth.Get((byte*)s + op->R0));
        Access.Commit(s);
        return op + 1;
    }

    private static bool Add<TWidth>(VcpuBlock* s, Op* op, ulong addend, bool carry)
        where TWidth : struct, IWidth
    {
        byte* destination = (byte*)s + op->R0;
        System.UInt128 sum = (System.UInt128)TWidth.Get(destination) + addend + (carry ? 1u : 0u);
        TWidth.SetRegister(destination, (ulong)sum);
        return sum >> TWidth.Bits != 0;
    }
}
