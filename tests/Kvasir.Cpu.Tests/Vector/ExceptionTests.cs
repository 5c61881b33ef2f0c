using System;
using Kvasir.X86;
using Xunit;

namespace Kvasir.Cpu.Tests.Vector;

/// <summary>Which exception an instruction raises before or after it computes, where a user program of the host cannot show it.</summary>
public sealed unsafe class ExceptionTests
{
    private static readonly byte[] Addps = [0x0f, 0x58, 0xc1];
    private static readonly byte[] Divps = [0x0f, 0x5e, 0xc1];
    private static readonly byte[] Mulss = [0xf3, 0x0f, 0x59, 0xc1];
    private static readonly byte[] Fld1 = [0xd9, 0xe8];
    private static readonly byte[] Fldz = [0xd9, 0xee];
    private static readonly byte[] Fdivp = [0xde, 0xf9];
    private static readonly byte[] Fwait = [0x9b];
    private static readonly byte[] Fninit = [0xdb, 0xe3];

    [Theory]
    [InlineData("0f58c1", 0ul, 0ul, 0xff, "SSE")]
    [InlineData("0f58c1", (ulong)Cr0.TS, 0ul, 7, "SSE with TS")]
    [InlineData("0f58c1", (ulong)Cr0.EM, 0ul, 6, "SSE with EM")]
    [InlineData("0f58c1", (ulong)(Cr0.EM | Cr0.TS), 0ul, 6, "SSE with EM and TS")]
    [InlineData("0f58c1", 0ul, (ulong)Cr4.OSFXSR, 6, "SSE without OSFXSR")]
    [InlineData("0ffcc1", 0ul, (ulong)Cr4.OSFXSR, 0xff, "MMX without OSFXSR")]
    [InlineData("0ffcc1", (ulong)Cr0.TS, 0ul, 7, "MMX with TS")]
    [InlineData("0ffcc1", (ulong)Cr0.EM, 0ul, 6, "MMX with EM")]
    [InlineData("0f77", (ulong)Cr0.EM, 0ul, 6, "EMMS with EM")]
    [InlineData("c5f458c2", 0ul, 0ul, 0xff, "AVX")]
    [InlineData("c5f458c2", (ulong)Cr0.EM, 0ul, 0xff, "AVX with EM")]
    [InlineData("c5f458c2", (ulong)Cr0.TS, 0ul, 7, "AVX with TS")]
    [InlineData("c5f458c2", 0ul, (ulong)Cr4.OSXSAVE, 6, "AVX without OSXSAVE")]
    [InlineData("c5f877", 0ul, (ulong)Cr4.OSXSAVE, 6, "VZEROUPPER without OSXSAVE")]
    [InlineData("c4e2f8f2c1", (ulong)Cr0.TS, (ulong)Cr4.OSXSAVE, 0xff, "ANDN needs neither")]
    [InlineData("d9e8", (ulong)Cr0.EM, 0ul, 7, "x87 with EM")]
    [InlineData("d9e8", (ulong)Cr0.TS, 0ul, 7, "x87 with TS")]
    [InlineData("dbe3", (ulong)Cr0.TS, 0ul, 7, "FNINIT with TS")]
    [InlineData("9b", (ulong)Cr0.TS, 0ul, 7, "WAIT with MP and TS")]
    [InlineData("9b", (ulong)Cr0.EM, 0ul, 0xff, "WAIT with EM")]
    [InlineData("0fae0500001100", (ulong)Cr0.TS, 0ul, 7, "FXSAVE with TS")]
    [InlineData("0fae0500001100", 0ul, (ulong)Cr4.OSFXSR, 0xff, "FXSAVE without OSFXSR")]
    [InlineData("0fae2500001100", 0ul, (ulong)Cr4.OSXSAVE, 6, "XSAVE without OSXSAVE")]
    [InlineData("0f01d0", 0ul, (ulong)Cr4.OSXSAVE, 6, "XGETBV without OSXSAVE")]
    [InlineData("62f1744858c2", 0ul, 0ul, 6, "EVEX")]
    public void Control_registers_decide(string code, ulong setCr0, ulong clearCr4, int vector, string what)
    {
        Assert.SkipUnless(HostFeatures.Avx || !code.StartsWith("c5", StringComparison.Ordinal), "the host has no AVX");
        using VectorMachine machine = new(setCr0: setCr0, clearCr4: clearCr4);
        int raised = machine.Run(Convert.FromHexString(code));
        Assert.True(vector == raised, $"{what}: vector {raised}, not {vector}");
    }

    [Fact]
    public void Avx_needs_its_components_in_xcr0()
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        using VectorMachine machine = new(xcr0: 3);
        Assert.Equal((byte)ExceptionVector.InvalidOpcode, machine.Run(0xc5, 0xf4, 0x58, 0xc2));
    }

    [Theory]
    [InlineData(0ul, ExceptionVector.SimdFloatingPoint)]
    [InlineData((ulong)Cr4.OSXMMEXCPT, ExceptionVector.InvalidOpcode)]
    public void An_unmasked_exception_leaves_the_destination(ulong clearCr4, ExceptionVector vector)
    {
        using VectorMachine machine = new(clearCr4: clearCr4);
        Fill(machine, 0, 1, 1, 1, 1);
        Fill(machine, 1, 2, 0, 2, 2);
        machine.S->Mxcsr = 0x1f80 & ~0x200u;
        Assert.Equal((byte)vector, machine.Run(Divps));
        Assert.Equal(0x1d84u, machine.S->Mxcsr);
        Assert.Equal(1f, *(float*)machine.S->Vector);
        Assert.Equal(VectorMachine.Code, machine.S->Rip);
    }

    [Fact]
    public void An_exception_before_computation_hides_those_of_other_elements()
    {
        using VectorMachine machine = new();
        Fill(machine, 0, 0, 1, 1, 1);
        Fill(machine, 1, 0, 3, 3, 3);
        machine.S->Mxcsr = 0x1f80 & ~0x80u;
        Assert.Equal((byte)ExceptionVector.SimdFloatingPoint, machine.Run(Divps));
        Assert.Equal(1u, machine.S->Mxcsr & 0x3f);
    }

    [Fact]
    public void An_exact_tiny_result_underflows_only_unmasked()
    {
        using VectorMachine machine = new();
        const uint smallestNormal = 0x0080_0000;
        *(uint*)machine.S->Vector = smallestNormal;
        *(float*)(machine.S->Vector + 32) = 0.5f;
        Assert.Equal(Fault.None, machine.Run(Mulss));
        Assert.Equal(0x1f80u, machine.S->Mxcsr);
        *(uint*)machine.S->Vector = smallestNormal;
        machine.S->Mxcsr = 0x1f80 & ~0x800u;
        Assert.Equal((byte)ExceptionVector.SimdFloatingPoint, machine.Run(Mulss));
        Assert.Equal(0x10u, machine.S->Mxcsr & 0x3f);
        Assert.Equal(smallestNormal, *(uint*)machine.S->Vector);
    }

    [Fact]
    public void Rounding_is_the_guests_and_the_hosts_stays()
    {
        using VectorMachine machine = new();
        Fill(machine, 0, 1, 1, 1, 1);
        Fill(machine, 1, 3, 3, 3, 3);
        machine.S->Mxcsr = 0x1f80 | 0x4000;
        Assert.Equal(Fault.None, machine.Run(Divps));
        Assert.Equal(0x3eaa_aaabu, *(uint*)machine.S->Vector);
        Fill(machine, 0, 1, 1, 1, 1);
        machine.S->Mxcsr = 0x1f80 | 0x2000;
        Assert.Equal(Fault.None, machine.Run(Divps));
        Assert.Equal(0x3eaa_aaaau, *(uint*)machine.S->Vector);
        float three = 3;
        Assert.Equal(0x3eaa_aaabu, BitConverter.SingleToUInt32Bits(1 / three));
    }

    [Fact]
    public void A_pending_x87_exception_is_reported_by_the_next_waiting_instruction()
    {
        using VectorMachine machine = new();
        DivideByZero(machine);
        Assert.Equal((byte)ExceptionVector.FloatingPoint, machine.Run(Fld1));
        Assert.Equal((byte)ExceptionVector.FloatingPoint, machine.Run(Fwait));
        Assert.Equal((byte)ExceptionVector.FloatingPoint, machine.Run(0x0f, 0xfc, 0xc1));
        Assert.Equal(Fault.None, machine.Run(Addps));
        Assert.Equal(Fault.None, machine.Run(0xdf, 0xe0));
        Assert.Equal(0x8084ul, machine.S->Gpr[0] & 0x80ff);
        Assert.Equal(Fault.None, machine.Run(0xdb, 0xe2));
        Assert.Equal(Fault.None, machine.Run(Fld1));
    }

    [Fact]
    public void Without_NE_the_error_goes_out_on_FERR()
    {
        using VectorMachine machine = new(clearCr0: (ulong)Cr0.NE);
        bool? ferr = null;
        machine.Vcpu.Vectors.NumericError = level => ferr = level;
        DivideByZero(machine);
        Assert.Null(ferr);
        Assert.Equal(Fault.None, machine.Run(Fld1));
        Assert.True(ferr);
        Assert.Equal(VectorMachine.Code, machine.S->Rip);
        machine.Vcpu.Vectors.IgnoreNumericError = true;
        byte tags = X87State.Tags(machine.S);
        Assert.Equal(Fault.None, machine.Run(Fld1));
        Assert.Equal(VectorMachine.Code + 2ul, machine.S->Rip);
        Assert.NotEqual(tags, X87State.Tags(machine.S));
        Assert.True(X87State.IsPending(machine.S));
        Assert.Equal(Fault.None, machine.Run(Fninit));
        Assert.False(ferr);
        Assert.False(machine.Vcpu.Vectors.IgnoreNumericError);
    }

    [Theory]
    [InlineData(VectorMachine.Data)]
    [InlineData((uint)VectorMachine.Device)]
    public void A_store_that_overflows_unmasked_writes_nothing(uint place)
    {
        using VectorMachine machine = new();
        *(double*)machine.At(VectorMachine.Data + 64) = 1e300;
        *(uint*)machine.At(VectorMachine.Data) = 0x0302_0100;
        Assert.Equal(Fault.None, machine.Run(0xdd, 0x05, 0x40, 0, 0x11, 0));
        X87State.SetControl(machine.S, 0x37f & ~8);
        byte[] code = [0xd9, 0x1d, .. BitConverter.GetBytes(place)];
        Assert.Equal(Fault.None, machine.Run(code));
        Assert.True(X87State.IsPending(machine.S));
        Assert.Equal(0x80, X87State.Tags(machine.S));
        Assert.Equal(0x0302_0100u, *(uint*)machine.At(VectorMachine.Data));
        Assert.Equal(3, machine.Registers[3]);
        Assert.False(machine.S->StorePending);
    }

    [Theory]
    [InlineData("0f280508001100", 13)]
    [InlineData("0f290508001100", 13)]
    [InlineData("0f100508001100", 0xff)]
    [InlineData("0f580508001100", 13)]
    [InlineData("c5f8280508001100", 13)]
    [InlineData("c5f0580508001100", 0xff)]
    public void Alignment_is_asked_of_legacy_operands(string code, int vector)
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        using VectorMachine machine = new();
        Assert.Equal(vector, machine.Run(Convert.FromHexString(code)));
    }

    private static void DivideByZero(VectorMachine machine)
    {
        X87State.SetControl(machine.S, 0x37f & ~4);
        Assert.Equal(Fault.None, machine.Run(Fld1));
        Assert.Equal(Fault.None, machine.Run(Fldz));
        Assert.Equal(Fault.None, machine.Run(Fdivp));
        Assert.True(X87State.IsPending(machine.S));
    }

    private static void Fill(VectorMachine machine, int register, float a, float b, float c, float d)
    {
        float* p = (float*)(machine.S->Vector + register * VcpuBlock.VectorStride);
        p[0] = a;
        p[1] = b;
        p[2] = c;
        p[3] = d;
    }
}
