using System;

namespace Kvasir.Core;

/// <summary>Why <see cref="IVcpu.Run"/> came back.</summary>
public enum VcpuExit
{
    /// <summary>Somebody called <see cref="IVcpu.Kick"/>.</summary>
    Kicked,

    /// <summary>A fault during the delivery of a double fault: the processor shut down.</summary>
    TripleFault,

    /// <summary>A breakpoint, watchpoint or single step that the debugger asked for.</summary>
    Debug,

    /// <summary>The accelerator cannot go on; <see cref="IVcpu.FailureReport"/> says why.</summary>
    Failure,
}

/// <summary>A vCPU's pins, as interrupt controllers and the board drive them. Any thread may call; none blocks.</summary>
public interface IVcpuSignals
{
    /// <summary>INTR may have changed: the vCPU asks its <see cref="ILocalApic"/> again before its next instruction block.</summary>
    void InterruptChanged();

    void Nmi();

    /// <summary>INIT: reset to the wait-for-SIPI state (an application processor) or to the reset vector (the boot processor).</summary>
    void Init();

    /// <summary>Start-up IPI: begins at <paramref name="vector"/> × 1000h in real mode where the vCPU waits for one.</summary>
    void Sipi(byte vector);

    void Smi();
}

/// <summary>One virtual processor on some accelerator. One thread runs it; the thread that calls <see cref="Run"/> owns its state meanwhile.</summary>
public interface IVcpu : IVcpuSignals, IDisposable
{
    /// <summary>The processor's number, from 0; also its initial APIC ID.</summary>
    int Index { get; }

    /// <summary>Runs guest code until something below ends it. Port and memory-mapped I/O happen inside, on the buses.</summary>
    VcpuExit Run();

    /// <summary>Makes <see cref="Run"/> come back soon, or at once when it is called next. Any thread.</summary>
    void Kick();

    /// <summary>Takes out all architectural state. Only while <see cref="Run"/> is not running.</summary>
    void GetState(out CpuState state);

    /// <summary>Puts in all architectural state. Only while <see cref="Run"/> is not running.</summary>
    void SetState(in CpuState state);

    /// <summary>After <see cref="VcpuExit.TripleFault"/> or <see cref="VcpuExit.Failure"/>: registers, last instructions and the reason, for a person.</summary>
    string FailureReport { get; }

    /// <summary>Guest instructions retired since the vCPU was made; 0 where the accelerator does not count.</summary>
    ulong InstructionsRetired { get; }
}

/// <summary>
/// What a vCPU asks of its local APIC (Intel SDM vol. 3, ch. "APIC"). All members are called from the vCPU's own thread.
/// </summary>
public interface ILocalApic
{
    /// <summary>Whether an interrupt of sufficient priority, or one from the 8259s through LINT0, waits. Lock-free: it is read often.</summary>
    bool HasInterrupt { get; }

    /// <summary>The interrupt acknowledge cycle: moves the highest pending vector into service.</summary>
    /// <returns>The vector, or -1 where none waits any more.</returns>
    int Acknowledge();

    /// <summary>The task priority class, as CR8 shows it: bits 7:4 of TPR (0 to 15).</summary>
    byte TaskPriorityClass { get; set; }

    /// <summary>IA32_APIC_BASE: base address, enable, x2APIC enable and BSP bits.</summary>
    ulong Base { get; }

    /// <summary>
    /// The vCPU's time stamp counter minus <see cref="VmClock.TscNow"/>, in ticks. The vCPU sets it when that changes (writes of IA32_TIME_STAMP_COUNTER
    /// and IA32_TSC_ADJUST, restored state): the TSC-deadline timer counts by it.
    /// </summary>
    long TscOffset { get; set; }

    /// <summary>The 4 KiB page of registers at <see cref="Base"/> in xAPIC mode.</summary>
    IMmioDevice Registers { get; }

    /// <summary>Reads IA32_APIC_BASE (1Bh), IA32_TSC_DEADLINE (6E0h) or an x2APIC register (800h-8FFh).</summary>
    /// <returns>False where the access raises #GP.</returns>
    bool TryReadMsr(uint msr, out ulong value);

    /// <summary>Writes one of the MSRs of <see cref="TryReadMsr"/>.</summary>
    /// <returns>False where the access raises #GP.</returns>
    bool TryWriteMsr(uint msr, ulong value);

    /// <summary>The effect of an INIT signal on the APIC: as reset, but the APIC ID and base stay.</summary>
    void Init();
}
