using System;
using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// Handlers of MOVS, STOS, LODS, CMPS and SCAS. Repeated ones run page-wise as one host operation where both operands are plain memory
/// and ascend, element-wise otherwise; after each run they look whether something is pending and stop between iterations, to go on later.
/// </summary>
public static unsafe class Strings
{
    private const int Rax = 0;
    private const int Rcx = 8;
    private const int Rsi = 48;
    private const int Rdi = 56;

    /// <summary>Elements done before a look at what is pending.</summary>
    private const int Batch = 4096;

    public static Op* Move<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        if ((op->Flags & OpFlags.Rep) == 0)
            return MoveOne<TWidth, TAddress>(s, op) ? op + 1 : Access.Fault(s, op);
        long step = Step<TWidth>(s);
        int batch = BatchOf(s);
        for (int done = 0; ; done++)
        {
            ulong count = TAddress.Get((byte*)s + Rcx);
            if (count == 0)
                return op + 1;
            if (MustPause(s, done, batch))
                return Interrupted(s, op);
            if (step > 0 && batch != 1 && TryMoveRun<TWidth, TAddress>(s, op, count, out ulong moved))
            {
                Advance<TAddress>(s, Rsi, moved * (ulong)TWidth.Bytes);
                Advance<TAddress>(s, Rdi, moved * (ulong)TWidth.Bytes);
                TAddress.SetRegister((byte*)s + Rcx, count - moved);
                done += (int)moved;
                continue;
            }
            if (!MoveOne<TWidth, TAddress>(s, op))
                return Access.Fault(s, op);
            TAddress.SetRegister((byte*)s + Rcx, count - 1);
        }
    }

    public static Op* Store<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        if ((op->Flags & OpFlags.Rep) == 0)
            return StoreOne<TWidth, TAddress>(s, op) ? op + 1 : Access.Fault(s, op);
        long step = Step<TWidth>(s);
        int batch = BatchOf(s);
        for (int done = 0; ; done++)
        {
            ulong count = TAddress.Get((byte*)s + Rcx);
            if (count == 0)
                return op + 1;
            if (MustPause(s, done, batch))
                return Interrupted(s, op);
            if (step > 0 && batch != 1 && TryStoreRun<TWidth, TAddress>(s, op, count, out ulong stored))
            {
                Advance<TAddress>(s, Rdi, stored * (ulong)TWidth.Bytes);
                TAddress.SetRegister((byte*)s + Rcx, count - stored);
                done += (int)stored;
                continue;
            }
            if (!StoreOne<TWidth, TAddress>(s, op))
                return Access.Fault(s, op);
            TAddress.SetRegister((byte*)s + Rcx, count - 1);
        }
    }

    public static Op* Load<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        bool repeat = (op->Flags & OpFlags.Rep) != 0;
        int batch = repeat ? BatchOf(s) : Batch;
        for (int done = 0; ; done++)
        {
            ulong count = repeat ? TAddress.Get((byte*)s + Rcx) : 1;
            if (count == 0)
                return op + 1;
            if (MustPause(s, done, batch))
                return Interrupted(s, op);
            byte* p = Access.Read(s, Source<TAddress>(s, op, TWidth.Bytes), TWidth.Bytes);
            if (p == null)
                return Access.Fault(s, op);
            TWidth.SetRegister((byte*)s + Rax, TWidth.Get(p));
            Advance<TAddress>(s, Rsi, (ulong)Step<TWidth>(s));
            if (!repeat)
                return op + 1;
            TAddress.SetRegister((byte*)s + Rcx, count - 1);
        }
    }

    public static Op* Compare<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        bool repeat = (op->Flags & (OpFlags.Rep | OpFlags.Repne)) != 0;
        bool whileEqual = (op->Flags & OpFlags.Rep) != 0;
        int batch = repeat ? BatchOf(s) : Batch;
        for (int done = 0; ; done++)
        {
            ulong count = repeat ? TAddress.Get((byte*)s + Rcx) : 1;
            if (count == 0)
                return op + 1;
            if (MustPause(s, done, batch))
                return Interrupted(s, op);
            byte* source = Access.Read(s, Source<TAddress>(s, op, TWidth.Bytes), TWidth.Bytes);
            if (source == null)
                return Access.Fault(s, op);
            // The second read may use the scratch area that the first one points to.
            ulong a = TWidth.Get(source);
            byte* destination = Access.Read(s, Destination<TAddress>(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
            if (destination == null)
                return Access.Fault(s, op);
            ulong b = TWidth.Get(destination);
            Subtract.Do<TWidth>(s, a, b);
            ulong step = (ulong)Step<TWidth>(s);
            Advance<TAddress>(s, Rsi, step);
            Advance<TAddress>(s, Rdi, step);
            if (!repeat)
                return op + 1;
            TAddress.SetRegister((byte*)s + Rcx, count - 1);
            if (a == b != whileEqual)
                return op + 1;
        }
    }

    public static Op* Scan<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        bool repeat = (op->Flags & (OpFlags.Rep | OpFlags.Repne)) != 0;
        bool whileEqual = (op->Flags & OpFlags.Rep) != 0;
        ulong a = TWidth.Get((byte*)s + Rax);
        int batch = repeat ? BatchOf(s) : Batch;
        for (int done = 0; ; done++)
        {
            ulong count = repeat ? TAddress.Get((byte*)s + Rcx) : 1;
            if (count == 0)
                return op + 1;
            if (MustPause(s, done, batch))
                return Interrupted(s, op);
            byte* p = Access.Read(s, Destination<TAddress>(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
            if (p == null)
                return Access.Fault(s, op);
            ulong b = TWidth.Get(p);
            Subtract.Do<TWidth>(s, a, b);
            Advance<TAddress>(s, Rdi, (ulong)Step<TWidth>(s));
            if (!repeat)
                return op + 1;
            TAddress.SetRegister((byte*)s + Rcx, count - 1);
            if (a == b != whileEqual)
                return op + 1;
        }
    }

    /// <summary>Elements before the next pause: one where each iteration traps (TF) or may (breakpoints).</summary>
    private static int BatchOf(VcpuBlock* s) => (s->SystemFlags & (ulong)Rflags.TF) != 0 || SoftVcpu.From(s).Debug.IsActive ? 1 : Batch;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static bool MustPause(VcpuBlock* s, int done, int batch) => done >= batch && (s->Pending != 0 || batch == 1);

    /// <summary>Adds to an index register at the address size.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Advance<TAddress>(VcpuBlock* s, int register, ulong by)
        where TAddress : struct, IWidth
    {
        byte* p = (byte*)s + register;
        TAddress.SetRegister(p, TAddress.Get(p) + by);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static long Step<TWidth>(VcpuBlock* s)
        where TWidth : struct, IWidth => (s->SystemFlags & (ulong)Rflags.DF) == 0 ? TWidth.Bytes : -TWidth.Bytes;

    /// <summary>The linear address of DS:(R)SI, or with the segment that a prefix named.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Source<TAddress>(VcpuBlock* s, Op* op, int size)
        where TAddress : struct, IWidth
    {
        ulong offset = TAddress.Get((byte*)s + Rsi);
        if (op->Address is AddressKind.Long or AddressKind.Long32)
            return offset + s->SegBase[op->Seg];
        return Access.LegacySegment(s, op->Seg, offset, size, write: false);
    }

    /// <summary>The linear address of ES:(R)DI.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Destination<TAddress>(VcpuBlock* s, Op* op, int size, bool write)
        where TAddress : struct, IWidth
    {
        ulong offset = TAddress.Get((byte*)s + Rdi);
        if (op->Address is AddressKind.Long or AddressKind.Long32)
            return offset;
        return Access.LegacySegment(s, 0, offset, size, write);
    }

    private static bool MoveOne<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        byte* source = Access.Read(s, Source<TAddress>(s, op, TWidth.Bytes), TWidth.Bytes);
        if (source == null)
            return false;
        ulong value = TWidth.Get(source);
        byte* destination = Access.Overwrite(s, Destination<TAddress>(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (destination == null)
        {
            // The destination is in ES: a non-canonical address is #GP even where a prefix names SS for the source.
            s->FaultNonCanonical = false;
            return false;
        }
        TWidth.Put(destination, value);
        Access.Commit(s);
        ulong step = (ulong)Step<TWidth>(s);
        Advance<TAddress>(s, Rsi, step);
        Advance<TAddress>(s, Rdi, step);
        return true;
    }

    private static bool StoreOne<TWidth, TAddress>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        byte* destination = Access.Overwrite(s, Destination<TAddress>(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (destination == null)
            return false;
        TWidth.Put(destination, TWidth.Get((byte*)s + Rax));
        Access.Commit(s);
        Advance<TAddress>(s, Rdi, (ulong)Step<TWidth>(s));
        return true;
    }

    /// <summary>Moves as many whole elements as both operands' pages hold, where both translate to plain memory and do not overlap harmfully.</summary>
    private static bool TryMoveRun<TWidth, TAddress>(VcpuBlock* s, Op* op, ulong count, out ulong moved)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        moved = 0;
        ulong from = Source<TAddress>(s, op, TWidth.Bytes);
        ulong to = Destination<TAddress>(s, op, TWidth.Bytes, write: true);
        ulong elements = Math.Min(count, Math.Min(InPage<TWidth>(from), InPage<TWidth>(to)));
        if (elements < 2 || !Fits<TAddress>(s, op, elements * (ulong)TWidth.Bytes, source: true) || !Fits<TAddress>(s, op, elements * (ulong)TWidth.Bytes, source: false))
            return Decline(s);
        TlbEntry* read = s->ReadTlb + (from >> 12 & Tlb.IndexMask);
        TlbEntry* write = s->WriteTlb + (to >> 12 & Tlb.IndexMask);
        if ((from ^ read->Tag) > 4095 || (to ^ write->Tag) > 4095)
            return false;
        byte* source = read->Host + (from & 0xfff);
        byte* destination = write->Host + (to & 0xfff);
        ulong bytes = elements * (ulong)TWidth.Bytes;
        // Ascending copies into what lies ahead of the source repeat its pattern: only the element-wise way does that.
        if (destination > source && destination < source + bytes)
            return false;
        Buffer.MemoryCopy(source, destination, bytes, bytes);
        moved = elements;
        return true;
    }

    private static bool TryStoreRun<TWidth, TAddress>(VcpuBlock* s, Op* op, ulong count, out ulong stored)
        where TWidth : struct, IWidth
        where TAddress : struct, IWidth
    {
        stored = 0;
        ulong to = Destination<TAddress>(s, op, TWidth.Bytes, write: true);
        ulong elements = Math.Min(count, InPage<TWidth>(to));
        if (elements < 2 || !Fits<TAddress>(s, op, elements * (ulong)TWidth.Bytes, source: false))
            return Decline(s);
        TlbEntry* write = s->WriteTlb + (to >> 12 & Tlb.IndexMask);
        if ((to ^ write->Tag) > 4095)
            return false;
        byte* destination = write->Host + (to & 0xfff);
        ulong value = s->Gpr[0];
        if (TWidth.Bytes == 1)
            new Span<byte>(destination, (int)elements).Fill((byte)value);
        else if (TWidth.Bytes == 2)
            new Span<ushort>(destination, (int)elements).Fill((ushort)value);
        else if (TWidth.Bytes == 4)
            new Span<uint>(destination, (int)elements).Fill((uint)value);
        else
            new Span<ulong>(destination, (int)elements).Fill(value);
        stored = elements;
        return true;
    }

    /// <summary>Whether a run of bytes from SI or DI stays inside the address size and, in legacy modes, the segment.</summary>
    private static bool Fits<TAddress>(VcpuBlock* s, Op* op, ulong bytes, bool source)
        where TAddress : struct, IWidth
    {
        ulong offset = TAddress.Get((byte*)s + (source ? Rsi : Rdi));
        if (op->Address == AddressKind.Long)
            return true;
        if (offset + bytes - 1 != TAddress.Truncate(offset + bytes - 1))
            return false;
        if (op->Address == AddressKind.Long32)
            return true;
        int segment = source ? op->Seg : 0;
        return offset + bytes <= (source ? s->SegReadEnd[segment] : s->SegWriteEnd[segment]);
    }

    /// <summary>Not as a run: the element-wise way finds the fault, if there is one, again.</summary>
    private static bool Decline(VcpuBlock* s)
    {
        s->SegmentFault = 0;
        return false;
    }

    /// <summary>Whole elements from an address to its page's end.</summary>
    private static ulong InPage<TWidth>(ulong linear)
        where TWidth : struct, IWidth => (4096 - (linear & 0xfff)) / (ulong)TWidth.Bytes;

    /// <summary>Stops between iterations: the instruction goes on after what is pending was handled.</summary>
    private static Op* Interrupted(VcpuBlock* s, Op* op)
    {
        s->Rip = Access.CurrentRip(s, op);
        s->Retired += (ulong)(op->Ordinal - 1);
        return null;
    }
}
