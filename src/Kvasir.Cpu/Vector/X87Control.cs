using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>x87 control instructions: they move and change the state without computing (Intel SDM vol. 2, F2XM1 to FYL2XP1 and WAIT).</summary>
internal static unsafe class X87Control
{
    private const int MaximumImage = 108;

    /// <summary>WAIT/FWAIT: #NM only where CR0.MP and TS are both set.</summary>
    public static Op* Wait(VcpuBlock* s, Op* op)
    {
        const ulong both = (ulong)(Cr0.MP | Cr0.TS);
        if ((s->Cr0 & both) == both)
            return Access.Raise(s, op, ExceptionVector.DeviceNotAvailable);
        return !X87State.IsPending(s) || SoftVcpu.From(s).Vectors.ReportPending() ? op + 1 : Access.Fault(s, op);
    }

    /// <summary>FNOP.</summary>
    public static Op* Nothing(VcpuBlock* s, Op* op) => X87Gate.Open(s) ? op + 1 : Access.Fault(s, op);

    /// <summary>FNENI, FNDISI, FNSETPM: the 8087's and 80287's own control instructions, which later processors ignore without waiting.</summary>
    public static Op* Ignored(VcpuBlock* s, Op* op) => X87ControlGate.Open(s) ? op + 1 : Access.Fault(s, op);

    public static Op* Initialize(VcpuBlock* s, Op* op)
    {
        if (!X87ControlGate.Open(s))
            return Access.Fault(s, op);
        X87State.Initialize(s);
        SoftVcpu.From(s).Vectors.ErrorCleared();
        return op + 1;
    }

    /// <summary>FNCLEX.</summary>
    public static Op* ClearExceptions(VcpuBlock* s, Op* op)
    {
        if (!X87ControlGate.Open(s))
            return Access.Fault(s, op);
        const ushort stackFault = 0x40;
        X87State.SetStatus(s, (ushort)(X87State.Status(s) & ~(X87State.Exceptions | stackFault)));
        SoftVcpu.From(s).Vectors.ErrorCleared();
        return op + 1;
    }

    public static Op* StoreStatusToAx(VcpuBlock* s, Op* op)
    {
        if (!X87ControlGate.Open(s))
            return Access.Fault(s, op);
        *(ushort*)s->Gpr = X87State.Status(s);
        return op + 1;
    }

    public static Op* StoreStatus(VcpuBlock* s, Op* op) =>
        X87ControlGate.Open(s) && Access.Store16(s, Access.Linear(s, op, 2, write: true), X87State.Status(s)) ? op + 1 : Access.Fault(s, op);

    public static Op* StoreControl(VcpuBlock* s, Op* op) =>
        X87ControlGate.Open(s) && Access.Store16(s, Access.Linear(s, op, 2, write: true), X87State.Control(s)) ? op + 1 : Access.Fault(s, op);

    public static Op* LoadControl(VcpuBlock* s, Op* op)
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        byte* memory = Access.Read(s, Access.Linear(s, op, 2, write: false), 2);
        if (memory == null)
            return Access.Fault(s, op);
        X87State.SetControl(s, *(ushort*)memory);
        return op + 1;
    }

    public static Op* Emms(VcpuBlock* s, Op* op)
    {
        if (!MmxGate.Open(s))
            return Access.Fault(s, op);
        X87State.LeaveMmx(s);
        return op + 1;
    }

    /// <summary>FNSTENV; <see cref="Op.R0"/> is 14 or 28.</summary>
    public static Op* StoreEnvironment(VcpuBlock* s, Op* op)
    {
        if (!X87ControlGate.Open(s))
            return Access.Fault(s, op);
        byte* image = stackalloc byte[MaximumImage];
        X87Environment.Write(s, image, op->R0 == 28);
        if (!TryStore(s, op, image))
            return Access.Fault(s, op);
        // All exceptions are masked afterwards, so that the handler that stored it can compute.
        X87State.SetControl(s, (ushort)(X87State.Control(s) | X87State.Exceptions));
        return op + 1;
    }

    public static Op* LoadEnvironment(VcpuBlock* s, Op* op)
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        byte* image = stackalloc byte[MaximumImage];
        if (!TryLoad(s, op, image))
            return Access.Fault(s, op);
        X87Environment.Read(s, image, op->R0 == 28);
        return op + 1;
    }

    /// <summary>FNSAVE; <see cref="Op.R0"/> is 94 or 108: the environment, the registers in stack order, then FNINIT.</summary>
    public static Op* Save(VcpuBlock* s, Op* op)
    {
        if (!X87ControlGate.Open(s))
            return Access.Fault(s, op);
        byte* image = stackalloc byte[MaximumImage];
        bool wide = op->R0 == 108;
        X87Environment.Write(s, image, wide);
        byte* registers = image + (wide ? 28 : 14);
        for (int i = 0; i < 8; i++)
            System.Buffer.MemoryCopy(X87State.Register(s, i), registers + i * 10, 10, 10);
        if (!TryStore(s, op, image))
            return Access.Fault(s, op);
        X87State.Initialize(s);
        SoftVcpu.From(s).Vectors.ErrorCleared();
        return op + 1;
    }

    public static Op* Restore(VcpuBlock* s, Op* op)
    {
        if (!X87Gate.Open(s))
            return Access.Fault(s, op);
        byte* image = stackalloc byte[MaximumImage];
        if (!TryLoad(s, op, image))
            return Access.Fault(s, op);
        bool wide = op->R0 == 108;
        byte* registers = image + (wide ? 28 : 14);
        for (int i = 0; i < 8; i++)
        {
            byte* register = X87State.Register(s, i);
            System.Buffer.MemoryCopy(registers + i * 10, register, 10, 10);
        }
        X87Environment.Read(s, image, wide, registersFollow: true);
        return op + 1;
    }

    private static bool TryStore(VcpuBlock* s, Op* op, byte* image)
    {
        ulong linear = Access.Linear(s, op, op->R0, write: true);
        return IsAligned(s, op, linear) && Bulk.TryProbeWrite(s, linear, op->R0, BulkOrder.Ends) && Bulk.Write(s, linear, image, op->R0);
    }

    private static bool TryLoad(VcpuBlock* s, Op* op, byte* image)
    {
        ulong linear = Access.Linear(s, op, op->R0, write: false);
        return IsAligned(s, op, linear) && Bulk.TryRead(s, linear, image, op->R0, BulkOrder.Ends);
    }

    /// <summary>Images of the 32-bit forms (28 and 108 bytes) consist of double words, the others of words.</summary>
    private static bool IsAligned(VcpuBlock* s, Op* op, ulong linear)
    {
        uint unit = op->R0 is 28 or 108 ? 4u : 2u;
        return (linear & (unit - 1)) == 0 || !WideAlignment.IsChecked(s) || Access.Record(s, ExceptionVector.AlignmentCheck, 0);
    }
}
