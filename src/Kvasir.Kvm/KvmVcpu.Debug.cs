using System;
using Kvasir.Core;

namespace Kvasir.Kvm;

/// <content>Breakpoints and single steps that the guest does not see.</content>
public sealed unsafe partial class KvmVcpu
{
    /// <summary>Breakpoints that the processor compares with.</summary>
    private const int Comparators = 4;

    private const ulong ReservedDr7 = 0x400;

    private ulong[] _userBreakpoints = [];
    private bool _singleStep;

    /// <summary>Breakpoints that there is room for.</summary>
    public int MostBreakpoints => _vm.MendsRing3 ? Comparators - 2 : Comparators;

    /// <summary>Has <see cref="Run"/> come back with <see cref="VcpuExit.Debug"/> after each instruction, or before those at given addresses. Only while it is not running.</summary>
    /// <param name="singleStep">After each instruction.</param>
    /// <param name="breakpoints">Linear addresses, up to <see cref="MostBreakpoints"/>.</param>
    /// <exception cref="ArgumentException">Too many breakpoints.</exception>
    /// <exception cref="Linux.LinuxException">KVM refused.</exception>
    public void SetGuestDebug(bool singleStep, params ReadOnlySpan<ulong> breakpoints)
    {
        if (breakpoints.Length > MostBreakpoints)
            throw new ArgumentException($"there is room for {MostBreakpoints} breakpoints, not {breakpoints.Length}", nameof(breakpoints));
        _singleStep = singleStep;
        _userBreakpoints = breakpoints.ToArray();
        WriteGuestDebug();
    }

    private bool IsUserBreakpoint(ulong address) => Array.IndexOf(_userBreakpoints, address) >= 0;

    private void WriteGuestDebug()
    {
        Span<ulong> addresses = stackalloc ulong[Comparators];
        addresses.Clear();
        int count = _userBreakpoints.Length;
        _userBreakpoints.CopyTo(addresses);
        if (_pageFaultHandler != 0)
            addresses[count++] = _pageFaultHandler;
        if (_invalidOpcodeHandler != 0)
            addresses[count++] = _invalidOpcodeHandler;
        ulong dr7 = ReservedDr7;
        for (int i = 0; i < count; i++)
            dr7 |= 2ul << i * 2;
        KvmGuestDebug debug = new()
        {
            Control = (_singleStep || count > 0 ? KvmGuestDebug.Enable : 0)
                | (_singleStep ? KvmGuestDebug.SingleStep : 0)
                | (count > 0 ? KvmGuestDebug.HardwareBreakpoints : 0),
            Dr0 = addresses[0],
            Dr1 = addresses[1],
            Dr2 = addresses[2],
            Dr3 = addresses[3],
            Dr7 = dr7,
        };
        FlushRegisters();
        Call(KvmRequest.SetGuestDebug, &debug, "set the breakpoints");
    }
}
