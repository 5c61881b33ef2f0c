using System;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <content>What the guest asked for when it left.</content>
public sealed unsafe partial class KvmVcpu
{
    private const ulong ApicEnabled = 1ul << 11;
    private const ulong ApicX2 = 1ul << 10;
    private const ulong ApicPageMask = 0x000f_ffff_ffff_f000;
    private const int MostReportedMsrs = 64;
    private const int MostEmptyRings = 1000;

    private bool _interruptible;
    private int _reportedMsrs;
    private int _emptyRings;

    /// <summary>Handles the exit that KVM_RUN came back with.</summary>
    /// <returns>Null where the guest goes on.</returns>
    private VcpuExit? HandleExit()
    {
        switch (Page->ExitReason)
        {
            case KvmExitReason.Io:
                HandlePort();
                return null;
            case KvmExitReason.Mmio:
                HandleMmio();
                return null;
            case KvmExitReason.Halt:
                _interruptible = Page->InterruptFlag != 0;
                _activity = VcpuActivity.Halted;
                return null;
            case KvmExitReason.EndOfInterrupt:
                _kernelInterrupts?.EndOfInterrupt(Page->EndedVector);
                return null;
            case KvmExitReason.InterruptWindow or KvmExitReason.Interrupted or KvmExitReason.SetTaskPriority:
                return null;
            case KvmExitReason.ReadMsr:
                HandleReadMsr();
                return null;
            case KvmExitReason.WriteMsr:
                HandleWriteMsr();
                return null;
            case KvmExitReason.DirtyRingFull:
                // Another thread may have emptied it meanwhile, but not each time.
                if (_vm.DrainDirtyRings())
                    _emptyRings = 0;
                return ++_emptyRings < MostEmptyRings ? null : Fail("KVM says that the ring of written pages is full, and there is nothing in it");
            case KvmExitReason.Shutdown:
                _activity = VcpuActivity.Shutdown;
                return ReportTripleFault();
            case KvmExitReason.Debug:
                return HandleDebug();
            case KvmExitReason.InternalError when Page->InternalError == KvmInternalError.EmulationFailure:
                return Rescue();
            case KvmExitReason.InternalError:
                return Fail(DescribeInternalError());
            case KvmExitReason.FailedEntry:
                return Fail($"the host's processor refused the vCPU's state (reason {Page->FailedEntryReason:x}h)");
            default:
                return Fail($"KVM came back for a reason that Kvasir does not know ({Page->ExitReason})");
        }
    }

    private void HandlePort()
    {
        KvmRunPage* page = Page;
        // SAFETY: KVM keeps the data of all repetitions inside the shared pages, at the offset that it names.
        byte* data = _map + page->IoDataOffset;
        ushort port = page->IoPort;
        AccessSize size = (AccessSize)page->IoSize;
        _completing = true;
        for (uint left = page->IoCount; left > 0; left--, data += (int)size)
        {
            if (page->IoIsWrite == 0)
                Store(data, size, _ports.Read(port, size));
            else
                _ports.Write(port, size, Load(data, size));
        }
    }

    private static uint Load(byte* data, AccessSize size) => size switch
    {
        AccessSize.Byte => *data,
        AccessSize.Word => *(ushort*)data,
        _ => *(uint*)data,
    };

    private static void Store(byte* data, AccessSize size, uint value)
    {
        switch (size)
        {
            case AccessSize.Byte:
                *data = (byte)value;
                break;
            case AccessSize.Word:
                *(ushort*)data = (ushort)value;
                break;
            default:
                *(uint*)data = value;
                break;
        }
    }

    private void HandleMmio()
    {
        KvmRunPage* page = Page;
        ulong address = page->MmioAddress;
        uint length = Math.Min(page->MmioLength, 8);
        bool write = page->MmioIsWrite != 0;
        _completing = true;
        if (length is 1 or 2 or 4 or 8)
        {
            if (write)
                WriteMemory(address, (AccessSize)length, page->MmioData);
            else
                page->MmioData = ReadMemory(address, (AccessSize)length);
            return;
        }
        // Part of an access across a page boundary.
        byte* data = (byte*)&page->MmioData;
        for (uint i = 0; i < length; i++)
        {
            if (write)
                WriteMemory(address + i, AccessSize.Byte, data[i]);
            else
                data[i] = (byte)ReadMemory(address + i, AccessSize.Byte);
        }
    }

    private ulong ReadMemory(ulong address, AccessSize size)
    {
        if (!IsApicPage(address))
            return _mmio.Read(new Gpa(address), size);
        return size == AccessSize.Dword ? _apic.Registers.Read(address & 0xfff, size) : ReadApicPart(address & 0xfff, size);
    }

    private void WriteMemory(ulong address, AccessSize size, ulong value)
    {
        if (!IsApicPage(address))
        {
            _mmio.Write(new Gpa(address), size, value);
            return;
        }
        // Narrower or wider accesses than 32 bits are undefined (Intel SDM vol. 3, "APIC Register Address Map"): the aligned register takes them.
        _apic.Registers.Write(address & 0xffc, AccessSize.Dword, (uint)value);
        ReloadTaskPriority();
    }

    private ulong ReadApicPart(ulong offset, AccessSize size)
    {
        ulong value = _apic.Registers.Read(offset & 0xffc, AccessSize.Dword) >> (int)(offset & 3) * 8;
        return size == AccessSize.Qword ? value : value & ((1ul << (int)size * 8) - 1);
    }

    private bool IsApicPage(ulong address)
    {
        ulong apicBase = _apic.Base;
        return (apicBase & (ApicEnabled | ApicX2)) == ApicEnabled && ((address ^ apicBase) & ApicPageMask) == 0;
    }

    private void HandleReadMsr()
    {
        _completing = true;
        KvmRunPage* page = Page;
        bool known = IsApicMsr(page->MsrIndex) && _apic.TryReadMsr(page->MsrIndex, out page->MsrData);
        page->MsrError = known ? (byte)0 : (byte)1;
        if (!known)
            ReportMsr("read", page->MsrIndex);
    }

    private void HandleWriteMsr()
    {
        _completing = true;
        KvmRunPage* page = Page;
        uint index = page->MsrIndex;
        bool known = false;
        if (index == Msr.Lstar && _vm.MendsRing3)
        {
            known = TryWriteSystemCallEntry(page->MsrData);
        }
        else if (IsApicMsr(index))
        {
            // The deadline counts by the guest's counter, which may have moved against the VM's clock.
            if (index == Msr.TscDeadline)
                _apic.TscOffset = ReadTscOffset();
            known = _apic.TryWriteMsr(index, page->MsrData);
            if (index == Msr.ApicBase && known)
                WriteApicBase();
            ReloadTaskPriority();
        }
        page->MsrError = known ? (byte)0 : (byte)1;
        if (!known)
            ReportMsr("write", index);
    }

    private static bool IsApicMsr(uint index) => index is Msr.ApicBase or Msr.TscDeadline or (>= Msr.X2ApicFirst and <= Msr.X2ApicLast);

    private void ReportMsr(string access, uint index)
    {
        if (_wiring.Log is { } log && _reportedMsrs++ < MostReportedMsrs)
            log($"vCPU {Index}: {access} of MSR {index:x}h, which is not there or not so: #GP");
    }

    /// <summary>The guest may have changed the task priority through the APIC's registers: CR8 shows it too.</summary>
    private void ReloadTaskPriority()
    {
        if (_kernelInterrupts is not null)
            return;
        _taskPriority = _apic.TaskPriorityClass;
        Page->Cr8 = _taskPriority;
    }

    private void WriteApicBase()
    {
        _registersShared = false;
        KvmSpecialRegisters special;
        Call(KvmRequest.GetSpecialRegisters, &special, "read the special registers");
        special.ApicBase = _apic.Base;
        special.Interrupts0 = special.Interrupts1 = special.Interrupts2 = special.Interrupts3 = 0;
        Call(KvmRequest.SetSpecialRegisters, &special, "write the special registers");
    }

    private string DescribeInternalError() => Page->InternalError switch
    {
        KvmInternalError.SimultaneousExceptions => "KVM met a fault while it delivered another",
        KvmInternalError.EventDelivery => "KVM could not deliver an event",
        KvmInternalError.UnexpectedExit => $"the host's processor left the guest for a reason unknown to KVM ({Page->InternalData0:x}h)",
        _ => $"KVM met an internal error ({(uint)Page->InternalError})",
    };
}
