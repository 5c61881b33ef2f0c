using System;
using System.Diagnostics;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <content>
/// SYSCALL on a KVM that leaves the guest in ring 3 with it (<see cref="SystemCallCheck"/>): RCX, R11, RIP and the flags are as they should be, but the first
/// fetch at LSTAR is ring 3's and raises #PF. A breakpoint on the guest's #PF handler shows each #PF; where it is that one, the event is taken back and
/// the rest of SYSCALL is made up for. The guest comes to ring 3 only through instructions that such a KVM cannot execute, or by a state that is set.
/// </content>
public sealed unsafe partial class KvmVcpu
{
    private const int PageFaultVector = 14;
    private const ulong GateSize = 16;

    /// <summary>A present page, a fetch, in ring 3 (Intel SDM vol. 3, "Page-Fault Error Code").</summary>
    private const ulong FetchInRing3 = 0x15;

    private const int PrivilegeMask = 3;
    private const uint KernelCode64 = 0xa09b;
    private const uint KernelStack = 0xc093;

    /// <summary>Linear address of the guest's #PF handler; 0: system calls are KVM's.</summary>
    private ulong _faultHandler;

    /// <summary>System calls that were completed here.</summary>
    public ulong CompletedSystemCalls { get; private set; }

    private bool IsRing3Of64BitKernel(in CpuState state) =>
        (state.Cs.Selector & PrivilegeMask) == PrivilegeMask && (state.Efer & (ulong)(Efer.LMA | Efer.SCE)) == (ulong)(Efer.LMA | Efer.SCE)
        && (state.Rflags & (ulong)Rflags.VM) == 0;

    /// <summary>Follows the guest's #PF gate. Only for states in ring 3.</summary>
    private void WatchPageFaults(in CpuState state)
    {
        ulong gate = state.Idtr.Base + PageFaultVector * GateSize;
        // A guest without the gate cannot take the fault either: nothing to watch.
        ulong handler = TryReadQword(gate, out ulong low) && TryReadQword(gate + 8, out ulong high)
            ? low & 0xffff | low >> 32 & 0xffff_0000 | high << 32
            : 0;
        if (handler == _faultHandler)
            return;
        _faultHandler = handler;
        WriteGuestDebug();
    }

    /// <summary>Handles the exit at a breakpoint or after a step.</summary>
    /// <returns>Null where the guest goes on.</returns>
    private VcpuExit? HandleDebug()
    {
        if (_faultHandler == 0 || Page->DebugPc != _faultHandler || _wiring.Rescue is not { } rescue)
            return VcpuExit.Debug;
        long begun = Stopwatch.GetTimestamp();
        GetState(out CpuState state);
        bool asked = IsUserBreakpoint(_faultHandler);
        if (TryTakeBackFault(ref state))
        {
            CompleteSystemCall(ref state);
            asked = IsUserBreakpoint(state.Rip);
        }
        if (asked)
        {
            WriteState(in state);
            return VcpuExit.Debug;
        }
        // Past the breakpoint, which would stop the guest again.
        if (Execute(rescue, ref state, begun, 0, 0) is { } end)
            return end;
        return _singleStep ? VcpuExit.Debug : null;
    }

    /// <summary>Whether the #PF that the guest is about to handle is that of a system call, and the state before it.</summary>
    private bool TryTakeBackFault(ref CpuState state)
    {
        ulong frame = state.Gpr[4];
        Span<ulong> words = stackalloc ulong[6];
        for (int i = 0; i < words.Length; i++)
        {
            if (!TryReadQword(frame + (ulong)i * 8, out words[i]))
                return false;
        }
        (ulong code, ulong rip, ulong cs, ulong flags, ulong rsp) = (words[0], words[1], words[2], words[3], words[4]);
        if (code != FetchInRing3 || rip != state.Lstar || state.Cr2 != state.Lstar || (cs & PrivilegeMask) != PrivilegeMask)
            return false;
        state.Rip = rip;
        state.Rflags = flags;
        state.Gpr[4] = rsp;
        return true;
    }

    /// <summary>What is left to do of SYSCALL (Intel SDM vol. 2, "SYSCALL"): the segments.</summary>
    private void CompleteSystemCall(ref CpuState state)
    {
        ushort code = (ushort)((ushort)(state.Star >> 32) & ~PrivilegeMask);
        state.Cs = new SegmentState(code, 0, uint.MaxValue, KernelCode64);
        state.Ss = new SegmentState((ushort)(code + 8), 0, uint.MaxValue, KernelStack);
        state.Rflags &= ~(ulong)(Rflags.RF | Rflags.VM);
        CompletedSystemCalls++;
    }

    /// <summary>Reads guest memory by linear address.</summary>
    private bool TryReadQword(ulong address, out ulong value)
    {
        value = 0;
        KvmTranslation translation = new() { LinearAddress = address };
        if ((address & (GuestMemory.PageSize - 1)) > GuestMemory.PageSize - 8 || _calls.Ioctl(_fd, KvmRequest.Translate, &translation) < 0 || translation.Valid == 0)
            return false;
        return _vm.Memory.TryRead(new Gpa(translation.PhysicalAddress), out value);
    }
}
