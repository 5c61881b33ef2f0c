using System.Collections.Generic;
using Iced.Intel;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Model-specific registers, counters and CPUID as a guest sees them.</summary>
internal static class MsrCases
{
    public static IEnumerable<SystemCase> All()
    {
        yield return RoundTrip("STAR", Msr.Star, 0x1122_3344_5566_7788);
        yield return RoundTrip("LSTAR", Msr.Lstar, 0xffff_8000_1234_5678);
        yield return RoundTrip("FMASK", Msr.Fmask, 0x4_7700);
        yield return RoundTrip("kernel GS base", Msr.KernelGsBase, 0xffff_8000_0000_1000);
        yield return RoundTrip("PAT", Msr.Pat, 0x0407_0106_0007_0500);
        yield return RoundTrip("TSC_AUX", Msr.TscAux, 0x1234);
        yield return RoundTrip("SYSENTER_ESP", Msr.SysenterEsp, 0xffff_8000_0000_2000);
        yield return RoundTrip("MTRR default type", Msr.MtrrDefType, 0xc06);
        yield return RoundTrip("MTRR base", Msr.MtrrPhysBase0 + 2, 0x8000_0000);
        yield return RoundTrip("MTRR mask", Msr.MtrrPhysBase0 + 3, 0x3fff_8000_0800);
        yield return RoundTrip("fixed MTRR", Msr.MtrrFix4kC0000, 0x0506_0506_0506_0506);
        yield return RoundTrip("bank 0 control", Msr.Mc0Ctl, ulong.MaxValue);

        yield return Refused("MTRR default type 2", Msr.MtrrDefType, 2);
        yield return Refused("MTRR capabilities", Msr.MtrrCap, 0x508);
        yield return Refused("EFER's reserved bits", Msr.Efer, 0x1_0d01);
        yield return Refused("TSC_AUX above 32 bits", Msr.TscAux, 1ul << 32);
        yield return Refused("a bank's status", Msr.Mc0Ctl + 1, 1);
        yield return Refused("XSS components", Msr.Xss, 0x100);

        SystemBuilder tsc = Long();
        tsc.Assemble(Program, a =>
        {
            a.mov(ecx, (int)Msr.Tsc);
            a.mov(eax, 0x1000);
            a.mov(edx, 0x10);
            a.wrmsr();
            a.rdtsc();
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(__dword_ptr[Slot(0) + 4], edx);
            a.mov(ecx, (int)Msr.TscAdjust);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(1)], eax);
            a.mov(__dword_ptr[Slot(1) + 4], edx);
            a.xor(eax, eax);
            a.xor(edx, edx);
            a.wrmsr();
            a.rdtsc();
            a.mov(__dword_ptr[Slot(2)], eax);
            Exit(a);
        });
        // The clock of a case stands at 0.
        yield return tsc.Expect("the counter", Slot(0), 8, 0x10_0000_1000).Expect("its adjustment", Slot(1), 8, 0x10_0000_1000).Expect("without it", Slot(2), 4, 0).Build("msr: TSC and TSC_ADJUST");

        SystemBuilder rdtscp = Long();
        rdtscp.State.TscAux = 0x77;
        rdtscp.Assemble(Program, a => { a.rdtscp(); a.mov(__qword_ptr[Slot(0)], rcx); a.rdpid(rdx); a.mov(__qword_ptr[Slot(1)], rdx); Exit(a); });
        yield return rdtscp.Expect("RDTSCP", Slot(0), 8, 0x77).Expect("RDPID", Slot(1), 8, 0x77).Build("msr: RDTSCP and RDPID");

        SystemBuilder random = Long();
        random.Assemble(Program, a =>
        {
            a.rdrand(rax);
            a.setc(__byte_ptr[Slot(0)]);
            a.rdseed(rcx);
            a.setc(__byte_ptr[Slot(1)]);
            a.cmp(rax, rcx);
            a.sete(__byte_ptr[Slot(2)]);
            Exit(a);
        });
        yield return random.Expect("RDRAND's CF", Slot(0), 1, 1).Expect("RDSEED's CF", Slot(1), 1, 1).Expect("the same number", Slot(2), 1, 0).Build("msr: RDRAND and RDSEED");

        SystemBuilder cpuid = ExceptionCases.WithCr4(Long(), Cr4.OSXSAVE);
        cpuid.Assemble(Program, a =>
        {
            a.mov(eax, 0x4000_0000);
            a.cpuid();
            a.mov(__dword_ptr[Slot(0)], ebx);
            a.mov(eax, 1);
            a.cpuid();
            a.shr(ecx, 27);
            a.and(ecx, 1);
            a.mov(__dword_ptr[Slot(1)], ecx);
            Exit(a);
        });
        yield return cpuid.Expect("Kvas", Slot(0), 4, 0x7361_764b).Expect("OSXSAVE", Slot(1), 4, 1).Build("cpuid: as the guest sees it");
    }

    private static void Write(Assembler a, uint msr, ulong value)
    {
        a.mov(ecx, (int)msr);
        a.mov(eax, (int)value);
        a.mov(edx, (int)(value >> 32));
    }

    private static SystemCase RoundTrip(string name, uint msr, ulong value)
    {
        SystemBuilder b = Long();
        b.Assemble(Program, a =>
        {
            Write(a, msr, value);
            a.wrmsr();
            a.xor(eax, eax);
            a.xor(edx, edx);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(10)], eax);
            a.mov(__dword_ptr[Slot(10) + 4], edx);
            Exit(a);
        });
        return b.Expect("what was written", Slot(10), 8, value).Build($"msr: {name} keeps a value");
    }

    private static SystemCase Refused(string name, uint msr, ulong value) =>
        ExceptionCases.Fault($"msr: #GP of {name}", Long(), a => Write(a, msr, value), a => a.wrmsr(), 13);
}
