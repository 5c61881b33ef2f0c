using System;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>In which order AMD's processors look at the pages of a wide operand: it decides which address a page fault gives. Others ascend.</summary>
internal enum BulkOrder
{
    Ascending,

    /// <summary>The last byte, then the rest (FXSAVE, FXRSTOR).</summary>
    LastFirst,

    /// <summary>The first byte, the last byte, then the rest (x87 environments, XSAVE).</summary>
    Ends,
}

/// <summary>Operands of many bytes (state images): checked wholly before anything is written.</summary>
internal static unsafe class Bulk
{
    private const int Chunk = 64;

    /// <summary>Reads guest memory. False: a fault was recorded.</summary>
    public static bool TryRead(VcpuBlock* s, ulong linear, byte* to, int size, BulkOrder order)
    {
        if (HostFeatures.IsAmd && order != BulkOrder.Ascending && s->SegmentFault == 0)
        {
            if (order == BulkOrder.Ends && Access.Read(s, linear, 1) == null)
                return false;
            if (Access.Read(s, Advance(s, linear, size - 1), 1) == null)
                return false;
        }
        while (size > 0)
        {
            int run = Math.Min(Math.Min(size, Chunk), ToPageEnd(linear));
            byte* memory = Access.Read(s, linear, run);
            if (memory == null)
                return false;
            Buffer.MemoryCopy(memory, to, run, run);
            to += run;
            size -= run;
            linear = Advance(s, linear, run);
        }
        return true;
    }

    /// <summary>Whether every byte may be written. False: a fault was recorded.</summary>
    public static bool TryProbeWrite(VcpuBlock* s, ulong linear, int size, BulkOrder order)
    {
        if (s->SegmentFault != 0)
        {
            ExceptionVector vector = (ExceptionVector)s->SegmentFault;
            s->SegmentFault = 0;
            return Access.Record(s, vector, 0);
        }
        Mmu mmu = SoftVcpu.From(s).Mmu;
        if (HostFeatures.IsAmd && order != BulkOrder.Ascending)
        {
            if (order == BulkOrder.Ends && !mmu.TryProbeWrite(mmu.CurrentRights, linear, 1))
                return false;
            if (!mmu.TryProbeWrite(mmu.CurrentRights, Advance(s, linear, size - 1), 1))
                return false;
        }
        return mmu.TryProbeWrite(mmu.CurrentRights, linear, size);
    }

    /// <summary>Writes guest memory that <see cref="TryProbeWrite"/> has found writable.</summary>
    public static bool Write(VcpuBlock* s, ulong linear, byte* from, int size)
    {
        while (size > 0)
        {
            int run = Math.Min(Math.Min(size, Chunk), ToPageEnd(linear));
            byte* memory = Access.Overwrite(s, linear, run);
            if (memory == null)
                return false;
            Buffer.MemoryCopy(from, memory, run, run);
            Access.Commit(s);
            from += run;
            size -= run;
            linear = Advance(s, linear, run);
        }
        return true;
    }

    /// <summary>A linear address further on; outside long mode it wraps at 4 GiB.</summary>
    public static ulong Advance(VcpuBlock* s, ulong linear, int bytes)
    {
        ulong next = linear + (ulong)bytes;
        return (s->Efer & (ulong)Efer.LMA) != 0 ? next : (uint)next;
    }

    private static int ToPageEnd(ulong linear) => (int)(4096 - (linear & 0xfff));
}
