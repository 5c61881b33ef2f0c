using Kvasir.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Interpreter;

/// <summary>What is printed of a guest that crashed.</summary>
public sealed class FailureReportTests
{
    [Fact]
    public void A_triple_fault_names_the_fault_and_the_last_instructions()
    {
        using LongModeMachine machine = new();
        machine.Assemble(LongModeMachine.Program, a =>
        {
            a.mov(ecx, 0x1234);
            a.bswap(ecx);
            a.mov(rsi, 0x7fff_0000_0000);
            // No gate for the page fault, none for the double fault.
            a.mov(eax, __dword_ptr[rsi + 0x55]);
        });
        machine.Place(0, LongModeMachine.Program);
        Assert.Equal(VcpuExit.TripleFault, machine.Vcpus[0].Run());
        string report = machine.Vcpus[0].FailureReport;
        Assert.Contains("PageFault (vector 14)", report, System.StringComparison.Ordinal);
        int last = report.IndexOf("last instructions:", System.StringComparison.Ordinal);
        int at = report.IndexOf("at rip:", System.StringComparison.Ordinal);
        Assert.True(last >= 0 && at > last, report);
        Assert.Contains("bswap ecx", report[last..at], System.StringComparison.Ordinal);
        Assert.Contains("[rsi+55h]", report[at..], System.StringComparison.Ordinal);
        Assert.Contains("cr2 00007fff00000055", report, System.StringComparison.Ordinal);
    }
}
