using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// A vCPU of the software CPU. Its architectural state lives in a <see cref="VcpuBlock"/>; this object owns the parts around it and runs the
/// loop that looks up blocks, executes them and delivers what comes in between.
/// </summary>
public sealed unsafe partial class SoftVcpu : IVcpu
{
    // Wiring
    private readonly VcpuBlock* _s;
    private GCHandle _handle;

    // State
    private VcpuActivity _activity;
    private int _sleeping;
    private int _sipiVector = -1;
    private bool _disposed;

    /// <summary>Makes a vCPU in its power-on state: the boot processor (index 0) active, others waiting for a start-up IPI.</summary>
    /// <param name="index">Number of the vCPU and initial APIC ID.</param>
    /// <param name="model">What CPUID tells the guest.</param>
    /// <param name="memory">Guest memory.</param>
    /// <param name="ports">The port I/O space.</param>
    /// <param name="mmio">The memory-mapped devices.</param>
    /// <param name="apic">This vCPU's local APIC.</param>
    /// <param name="clock">The VM's time.</param>
    /// <param name="code">Decoded blocks, shared by all vCPUs of the VM.</param>
    public SoftVcpu(int index, CpuModel model, GuestMemory memory, PortBus ports, MmioBus mmio, ILocalApic apic, VmClock clock, CodeCache code)
    {
        Index = index;
        Model = model;
        Memory = memory;
        Ports = ports;
        Mmio = mmio;
        Apic = apic;
        Clock = clock;
        Code = code;
        Barrier = code.Barrier;
        _s = (VcpuBlock*)NativeMemory.AlignedAlloc((nuint)sizeof(VcpuBlock), 64);
        *_s = default;
        _handle = GCHandle.Alloc(this);
        _s->Owner = GCHandle.ToIntPtr(_handle);
        _s->FaultVector = Fault.None;
        _s->HostMxcsr = FloatingPoint.DefaultMxcsr;
        _s->OpBase = code.Operations;
        Debug = new DebugUnit(this, _s);
        Mmu = new Mmu(this, _s, memory, mmio, code);
        Decoder = new BlockDecoder(this, _s);
        Interrupts = new InterruptDelivery(this, _s);
        Msrs = new MsrFile(this, _s);
        Vectors = new VectorUnit(_s);
        SetState(CpuState.AtReset(model.Signature));
        if (index != 0)
            _activity = VcpuActivity.WaitForSipi;
        Barrier.Add(this);
    }

    public int Index { get; }

    public CpuModel Model { get; }

    public GuestMemory Memory { get; }

    public PortBus Ports { get; }

    public MmioBus Mmio { get; }

    public ILocalApic Apic { get; }

    public VmClock Clock { get; }

    public CodeCache Code { get; }

    public ExecutionBarrier Barrier { get; }

    public Mmu Mmu { get; }

    public DebugUnit Debug { get; }

    public BlockDecoder Decoder { get; }

    public InterruptDelivery Interrupts { get; }

    public MsrFile Msrs { get; }

    public VectorUnit Vectors { get; }

    public string FailureReport { get; private set; } = "";

    public ulong InstructionsRetired => _s->Retired;

    /// <summary>The native state; the vCPU's own thread only.</summary>
    public VcpuBlock* Block => _s;

    /// <summary>What the guest's time stamp counter shows, less what <see cref="VmClock.TscNow"/> shows.</summary>
    public long TscOffset
    {
        get;
        set
        {
            field = value;
            // The APIC's deadline timer counts by the same counter.
            Apic.TscOffset = value;
        }
    }

    public ulong Tsc => Clock.TscNow + (ulong)TscOffset;

    /// <summary>STI, MOV SS or POP SS was just executed: interrupts wait for one instruction.</summary>
    public bool InterruptShadow { get; set; }

    /// <summary>The last instruction was MOV SS or POP SS: debug traps wait for the next one too.</summary>
    public bool DebugShadow { get; set; }

    public bool NmiBlocked { get; set; }

    internal bool CodeCacheFull { get; set; }

    /// <summary>A defect that a call-back of translated code met: thrown when that code has been left.</summary>
    internal Exception? TranslationFailure { get; set; }

    /// <summary>The vCPU whose state a handler was given.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static SoftVcpu From(VcpuBlock* s) => Unsafe.As<SoftVcpu>(GCHandle.FromIntPtr(s->Owner).Target!);

    /// <summary>Whether a physical address lies in the local APIC's page.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public bool IsApicPage(ulong physical)
    {
        // Most accesses are RAM well below: one compare decides before the APIC is asked where it is.
        if (physical < 0xa_0000)
            return false;
        ulong apicBase = Apic.Base;
        const ulong enabled = 1ul << 11;
        const ulong x2Apic = 1ul << 10;
        return (apicBase & (enabled | x2Apic)) == enabled && ((physical ^ apicBase) & 0x000f_ffff_ffff_f000) == 0;
    }

    /// <summary>The first byte of the page after an address, cut to 32 bits outside long mode.</summary>
    public ulong NextPage(ulong linear)
    {
        ulong next = (linear | 0xfff) + 1;
        return (_s->Efer & (ulong)Efer.LMA) != 0 ? next : (uint)next;
    }

    // IVcpuSignals

    public void InterruptChanged() => Post(PendingWork.Interrupt);

    public void Nmi() => Post(PendingWork.Nmi);

    public void Init() => Post(PendingWork.Init);

    public void Sipi(byte vector)
    {
        Volatile.Write(ref _sipiVector, vector);
        Post(PendingWork.Sipi);
    }

    public void Smi() => Post(PendingWork.Smi);

    public void Kick() => Post(PendingWork.Kick);

    /// <summary>Leaves work for the next block boundary and wakes the vCPU where it sleeps. Any thread.</summary>
    public void Post(PendingWork work)
    {
        Interlocked.Or(ref _s->Pending, (int)work);
        if (Volatile.Read(ref _sleeping) != 0)
            Futex.Wake(&_s->Pending);
    }

    /// <summary>HLT: the vCPU sleeps from the next instruction boundary on.</summary>
    public void Halt() => _activity = VcpuActivity.Halted;

    /// <summary>
    /// After a change of CS, SS, EFER, CR0, EFLAGS.VM or CPL: which blocks fit the mode now, and which tables. The handler must leave its block after it.
    /// </summary>
    public void UpdateMode()
    {
        uint cs = _s->SegAttributes[1];
        bool big = (cs & (uint)SegmentAttributes.Default32) != 0;
        bool longMode = (_s->Efer & (ulong)Efer.LMA) != 0 && (cs & (uint)SegmentAttributes.Long) != 0;
        uint mode;
        if (longMode)
        {
            mode = CodeMode.Code64 | CodeMode.Stack32;
        }
        else
        {
            mode = big ? CodeMode.Code32 : CodeMode.Code16;
            if ((_s->SegAttributes[2] & (uint)SegmentAttributes.Default32) != 0)
                mode |= CodeMode.Stack32;
            if ((_s->Cr0 & (ulong)Cr0.PE) == 0 || (_s->SystemFlags & (ulong)Rflags.VM) != 0)
                mode |= CodeMode.RealOrV86;
            if (_s->SegLimit[1] != 0xffff_ffff && (big || _s->SegLimit[1] < 0xffff))
                mode |= CodeMode.CodeLimited;
        }
        _s->Mode = mode;
        Mmu.UpdateRights();
    }

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        Barrier.Remove(this);
        Code.Translator?.Remember(this);
        Decoder.Dispose();
        Mmu.Dispose();
        _handle.Free();
        NativeMemory.AlignedFree(_s);
    }
}
