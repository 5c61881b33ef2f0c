using System;
using System.Diagnostics;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <content>
/// Ring 3 on a KVM that emulates kernels and runs user programs under page tables of its own (<see cref="SystemCallCheck"/> finds it). Two things go wrong
/// there. SYSCALL sets RCX, R11, RIP and the flags but leaves the guest in ring 3, so that the first fetch at LSTAR raises #PF. And where KVM emulates a user
/// instruction, which it does now and then for reasons of its own, one that its emulator does not know raises #UD. Breakpoints on the guest's handlers
/// show each #PF and #UD: such an event is taken back, and the rest of SYSCALL is made up for, or the software CPU executes the instruction.
/// </content>
public sealed unsafe partial class KvmVcpu
{
    private const ulong GateSize = 16;

    /// <summary>A present page, a fetch, in ring 3 (Intel SDM vol. 3, "Page-Fault Error Code").</summary>
    private const ulong FetchInRing3 = 0x15;

    private const int PrivilegeMask = 3;
    private const uint KernelCode64 = 0xa09b;
    private const uint KernelStack = 0xc093;

    /// <summary>Linear addresses of the guest's handlers; 0: not watched.</summary>
    private ulong _pageFaultHandler;
    private ulong _invalidOpcodeHandler;

    /// <summary>Where the gates were looked up last, and the entry of system calls then.</summary>
    private (ulong Table, ulong Entry) _gates;

    /// <summary>System calls that were completed here.</summary>
    public ulong CompletedSystemCalls { get; private set; }

    /// <summary>What a handler finds on its stack (Intel SDM vol. 3, "64-Bit Mode Stack Frame").</summary>
    private readonly record struct Frame(ulong Rip, ulong Cs, ulong Rflags, ulong Rsp, ulong Ss)
    {
        public bool IsRing3 => (Cs & PrivilegeMask) == PrivilegeMask;
    }

    /// <summary>
    /// Follows the guest's gates where they may have changed: with the table's place or the system calls' entry, which a kernel sets after its gates, and whenever the
    /// state is one of ring 3.
    /// </summary>
    private void FollowGates(in CpuState state)
    {
        if ((state.Efer & (ulong)Efer.LMA) == 0)
            return;
        bool isRing3 = (state.Cs.Selector & PrivilegeMask) == PrivilegeMask;
        if (isRing3 || (state.Lstar != 0 && _gates != (state.Idtr.Base, state.Lstar)))
            WatchFaults(state.Idtr.Base, state.Lstar);
    }

    /// <summary>The guest wrote where its system calls begin: KVM had it come here for that.</summary>
    /// <returns>False where the address is not canonical: #GP.</returns>
    private bool TryWriteSystemCallEntry(ulong address)
    {
        const int canonicalShift = 16;
        if ((ulong)((long)(address << canonicalShift) >> canonicalShift) != address)
            return false;
        KvmMsrBuffer one = default;
        one.Count = 1;
        one.Entries[0] = new KvmMsrEntry { Index = Msr.Lstar, Value = address };
        if (Call(KvmRequest.SetMsrs, &one, "write the system calls' entry") != 1)
            return false;
        KvmSpecialRegisters special;
        Call(KvmRequest.GetSpecialRegisters, &special, "read the special registers");
        if ((special.Efer & (ulong)Efer.LMA) != 0 && address != 0)
            WatchFaults(special.Idt.Base, address);
        return true;
    }

    private void WatchFaults(ulong table, ulong entry)
    {
        _gates = (table, entry);
        ulong pageFault = HandlerOf(ExceptionVector.PageFault, table);
        ulong invalidOpcode = HandlerOf(ExceptionVector.InvalidOpcode, table);
        if (pageFault == _pageFaultHandler && invalidOpcode == _invalidOpcodeHandler)
            return;
        _pageFaultHandler = pageFault;
        _invalidOpcodeHandler = invalidOpcode;
        WriteGuestDebug();
    }

    /// <returns>0 where there is no gate: the guest cannot take the fault either.</returns>
    private ulong HandlerOf(ExceptionVector vector, ulong table)
    {
        ulong gate = table + (ulong)vector * GateSize;
        return TryReadQword(gate, out ulong low) && TryReadQword(gate + 8, out ulong high)
            ? low & 0xffff | low >> 32 & 0xffff_0000 | high << 32
            : 0;
    }

    /// <summary>Handles the exit at a breakpoint or after a step.</summary>
    /// <returns>Null where the guest goes on.</returns>
    private VcpuExit? HandleDebug()
    {
        ulong at = Page->DebugPc;
        if (at == 0 || (at != _pageFaultHandler && at != _invalidOpcodeHandler) || _wiring.Rescue is not { } rescue)
            return VcpuExit.Debug;
        long begun = Stopwatch.GetTimestamp();
        GetState(out CpuState state);
        bool asked = IsUserBreakpoint(at);
        if (at == _pageFaultHandler ? TryTakeBackSystemCall(ref state) : TryTakeBackInvalidOpcode(ref state))
            asked = at == _pageFaultHandler && IsUserBreakpoint(state.Rip);
        if (asked)
        {
            WriteState(in state);
            return VcpuExit.Debug;
        }
        // The instruction itself, or the handler's first one: past the breakpoint, which would stop the guest again.
        if (Execute(rescue, ref state, begun, 0, 0) is { } end)
            return end;
        return _singleStep ? VcpuExit.Debug : null;
    }

    /// <summary>Whether the #PF that the guest is about to handle is that of a system call; then the state after SYSCALL.</summary>
    private bool TryTakeBackSystemCall(ref CpuState state)
    {
        if (!TryReadQword(state.Gpr[4], out ulong code) || code != FetchInRing3 || !TryReadFrame(state.Gpr[4] + 8, out Frame frame))
            return false;
        if (!frame.IsRing3 || frame.Rip != state.Lstar || state.Cr2 != state.Lstar || (state.Efer & (ulong)Efer.SCE) == 0)
            return false;
        state.Rip = frame.Rip;
        state.Rflags = frame.Rflags & ~(ulong)(Rflags.RF | Rflags.VM);
        state.Gpr[4] = frame.Rsp;
        // What is left to do of it (Intel SDM vol. 2, "SYSCALL").
        ushort selector = (ushort)((ushort)(state.Star >> 32) & ~PrivilegeMask);
        state.Cs = new SegmentState(selector, 0, uint.MaxValue, KernelCode64);
        state.Ss = new SegmentState((ushort)(selector + 8), 0, uint.MaxValue, KernelStack);
        CompletedSystemCalls++;
        return true;
    }

    /// <summary>Whether the #UD that the guest is about to handle came from 64-bit code in ring 3; then the state before it.</summary>
    private bool TryTakeBackInvalidOpcode(ref CpuState state)
    {
        const uint userCode64 = 0xa0fb;
        const uint userData = 0xc0f3;
        if (!TryReadFrame(state.Gpr[4], out Frame frame) || !frame.IsRing3)
            return false;
        state.Rip = frame.Rip;
        state.Rflags = frame.Rflags;
        state.Gpr[4] = frame.Rsp;
        state.Cs = new SegmentState((ushort)frame.Cs, 0, uint.MaxValue, userCode64);
        state.Ss = new SegmentState((ushort)frame.Ss, 0, uint.MaxValue, userData);
        return true;
    }

    private bool TryReadFrame(ulong address, out Frame frame)
    {
        frame = default;
        Span<ulong> words = stackalloc ulong[5];
        for (int i = 0; i < words.Length; i++)
        {
            if (!TryReadQword(address + (ulong)i * 8, out words[i]))
                return false;
        }
        frame = new Frame(words[0], words[1], words[2], words[3], words[4]);
        return true;
    }

    /// <summary>Reads guest memory by linear address.</summary>
    private bool TryReadQword(ulong address, out ulong value)
    {
        value = 0;
        FlushRegisters();
        KvmTranslation translation = new() { LinearAddress = address };
        if ((address & (GuestMemory.PageSize - 1)) > GuestMemory.PageSize - 8 || _calls.Ioctl(_fd, KvmRequest.Translate, &translation) < 0 || translation.Valid == 0)
            return false;
        return _vm.Memory.TryRead(new Gpa(translation.PhysicalAddress), out value);
    }
}
