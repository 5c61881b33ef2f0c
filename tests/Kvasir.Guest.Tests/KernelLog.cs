using System;
using System.Linq;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>What a Linux kernel prints when something is wrong under it: lost interrupts, stalled processors, clocks that disagree, faults.</summary>
/// <remarks>
/// Not that its fast TSC calibration failed: on a busy host its measurement is disturbed, it sees that, and measures again. Nor that a timer's interrupt took long: it
/// takes as long as its vCPU waits for one of the host's processors.
/// </remarks>
internal static class KernelLog
{
    private static readonly string[] Complaints =
    [
        "BUG:", "WARNING:", "Oops", "Call Trace", "Kernel panic", "general protection", "stack segment", "segfault", "traps:", "invalid opcode", "double fault",
        "rcu_sched detected", "rcu_preempt detected", "rcu: INFO", "self-detected stall", "soft lockup", "hard LOCKUP", "blocked for more than",
        "timekeeping watchdog", "Marking clocksource", "marked unstable", "Marking TSC unstable", "TSC synchronization", "TSC warp", "firmware bug",
        "timer doesn't work", "timer didn't work", "nobody cared", "Disabling IRQ", "Spurious", "APIC error", "failed to come online", "do_IRQ",
        "sched_clock: Marking unstable", "unhandled", "Machine check", "page allocation failure", "list_add corruption", "bad page state",
    ];

    /// <summary>Fails where one of them is there.</summary>
    public static void Check(string log)
    {
        string[] found = [.. log.Split('\n').Where(line => Complaints.Any(complaint => line.Contains(complaint, StringComparison.OrdinalIgnoreCase)))];
        Assert.True(found.Length == 0, $"the kernel complains:\n{string.Join('\n', found)}\n\nits whole log:\n{log}");
    }
}
