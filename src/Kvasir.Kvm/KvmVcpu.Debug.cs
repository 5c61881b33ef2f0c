using System;
using Kvasir.Core;

namespace Kvasir.Kvm;

/// <content>Breakpoints and single steps that the guest does not see.</content>
public sealed unsafe partial class KvmVcpu
{
    /// <summary>Breakpoints that the processor compares with.</summary>
    public const int MostBreakpoints = 4;

    private const ulong ReservedDr7 = 0x400;

    /// <summary>Has <see cref="Run"/> come back with <see cref="VcpuExit.Debug"/> after each instruction, or before those at given addresses. Only while it is not running.</summary>
    /// <param name="singleStep">After each instruction.</param>
    /// <param name="breakpoints">Linear addresses, up to <see cref="MostBreakpoints"/>.</param>
    /// <exception cref="ArgumentException">Too many breakpoints.</exception>
    /// <exception cref="Linux.LinuxException">KVM refused.</exception>
    public void SetGuestDebug(bool singleStep, params ReadOnlySpan<ulong> breakpoints)
    {
        if (breakpoints.Length > MostBreakpoints)
            throw new ArgumentException($"the processor has {MostBreakpoints} breakpoints, not {breakpoints.Length}", nameof(breakpoints));
        ulong dr7 = ReservedDr7;
        for (int i = 0; i < breakpoints.Length; i++)
            dr7 |= 2ul << i * 2;
        KvmGuestDebug debug = new()
        {
            Control = (singleStep || breakpoints.Length > 0 ? KvmGuestDebug.Enable : 0)
                | (singleStep ? KvmGuestDebug.SingleStep : 0)
                | (breakpoints.Length > 0 ? KvmGuestDebug.HardwareBreakpoints : 0),
            Dr0 = breakpoints.Length > 0 ? breakpoints[0] : 0,
            Dr1 = breakpoints.Length > 1 ? breakpoints[1] : 0,
            Dr2 = breakpoints.Length > 2 ? breakpoints[2] : 0,
            Dr3 = breakpoints.Length > 3 ? breakpoints[3] : 0,
            Dr7 = dr7,
        };
        Call(KvmRequest.SetGuestDebug, &debug, "set the breakpoints");
    }
}
