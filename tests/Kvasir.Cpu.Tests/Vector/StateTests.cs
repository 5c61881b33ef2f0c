using System;
using Kvasir.Core;
using Kvasir.X86;
using Xunit;

namespace Kvasir.Cpu.Tests.Vector;

/// <summary>State images, component masks and what crosses between memory, devices and registers.</summary>
public sealed unsafe class StateTests
{
    private static readonly byte[] Xsave = [0x0f, 0xae, 0x25, 0, 0, 0x11, 0];
    private static readonly byte[] Xrstor = [0x0f, 0xae, 0x2d, 0, 0, 0x11, 0];
    private static readonly byte[] Xsavec = [0x0f, 0xc7, 0x25, 0, 0, 0x11, 0];
    private static readonly byte[] Xsaves = [0x0f, 0xc7, 0x2d, 0, 0, 0x11, 0];
    private static readonly byte[] Xrstors = [0x0f, 0xc7, 0x1d, 0, 0, 0x11, 0];
    private static readonly byte[] Xsetbv = [0x0f, 0x01, 0xd1];
    private static readonly byte[] Xgetbv = [0x0f, 0x01, 0xd0];

    [Fact]
    public void Saved_state_comes_back()
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        foreach ((byte[] save, byte[] restore) in new[] { (Xsave, Xrstor), (Xsavec, Xrstor), (Xsaves, Xrstors) })
        {
            using VectorMachine machine = new();
            FillRegisters(machine, 7);
            byte[] before = new ReadOnlySpan<byte>(machine.S->Vector, 256).ToArray();
            machine.S->Gpr[0] = 7;
            machine.S->Mxcsr = 0x9fa5;
            Assert.Equal(Fault.None, machine.Run(0xd9, 0xeb));
            Assert.Equal(Fault.None, machine.Run(save));
            FillRegisters(machine, 8);
            machine.S->Mxcsr = 0x1f80;
            Assert.Equal(Fault.None, machine.Run(0xdb, 0xe3));
            Assert.Equal(Fault.None, machine.Run(restore));
            Assert.Equal(before, new ReadOnlySpan<byte>(machine.S->Vector, 256).ToArray());
            Assert.Equal(0x9fa5u, machine.S->Mxcsr);
            Assert.Equal(0x80, X87State.Tags(machine.S));
            Assert.Equal(0xc90f_daa2_2168_c235, *(ulong*)X87State.Register(machine.S, 0));
        }
    }

    [Fact]
    public void Components_in_their_initial_state_are_marked_and_restored_so()
    {
        using VectorMachine machine = new();
        machine.S->Gpr[0] = 7;
        Assert.Equal(Fault.None, machine.Run(Xsave));
        Assert.Equal(0ul, *(ulong*)machine.At(VectorMachine.Data + 512));
        FillRegisters(machine, 3);
        Assert.Equal(Fault.None, machine.Run(Xrstor));
        Assert.False(new ReadOnlySpan<byte>(machine.S->Vector, 256).ContainsAnyExcept((byte)0));
    }

    [Fact]
    public void A_partial_mask_leaves_the_rest()
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        using VectorMachine machine = new();
        FillRegisters(machine, 5);
        new Span<byte>(machine.At(VectorMachine.Data), 832).Fill(0xcc);
        *(ulong*)machine.At(VectorMachine.Data + 512) = 3;
        machine.S->Gpr[0] = 4;
        Assert.Equal(Fault.None, machine.Run(Xsave));
        Assert.Equal(7ul, *(ulong*)machine.At(VectorMachine.Data + 512));
        Assert.Equal(0xccccu, *(ushort*)machine.At(VectorMachine.Data));
        Assert.Equal(0x1f80u, *(uint*)machine.At(VectorMachine.Data + 24));
        Assert.Equal(0xccu, *machine.At(VectorMachine.Data + 160));
        Assert.Equal(*(ulong*)(machine.S->Vector + 16), *(ulong*)machine.At(VectorMachine.Data + 576));
        // Outside 64-bit mode there are eight registers.
        Assert.Equal(0xccu, *machine.At(VectorMachine.Data + 576 + 128));
    }

    [Theory]
    [InlineData(512, 8ul)]
    [InlineData(520, 1ul)]
    [InlineData(528, 1ul)]
    [InlineData(520, 0x8000_0000_0000_0001ul)]
    [InlineData(24, 0x0000_ffff_0004_1f80ul)]
    public void A_bad_image_raises_GP_and_loads_nothing(int offset, ulong value)
    {
        using VectorMachine machine = new();
        FillRegisters(machine, 1);
        machine.S->Gpr[0] = 7;
        Assert.Equal(Fault.None, machine.Run(Xsave));
        *(ulong*)machine.At(VectorMachine.Data + (uint)offset) = value;
        FillRegisters(machine, 2);
        byte[] before = new ReadOnlySpan<byte>(machine.S->Vector, 256).ToArray();
        Assert.Equal((byte)ExceptionVector.GeneralProtection, machine.Run(Xrstor));
        Assert.Equal(before, new ReadOnlySpan<byte>(machine.S->Vector, 256).ToArray());
    }

    [Theory]
    [InlineData(1ul, true)]
    [InlineData(3ul, true)]
    [InlineData(7ul, true)]
    [InlineData(0ul, false)]
    [InlineData(2ul, false)]
    [InlineData(5ul, false)]
    [InlineData(0xful, false)]
    public void Xcr0_takes_what_can_be(ulong value, bool good)
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        using VectorMachine machine = new(xcr0: 1);
        machine.S->Gpr[0] = value;
        Assert.Equal(good ? Fault.None : (byte)ExceptionVector.GeneralProtection, machine.Run(Xsetbv));
        Assert.Equal(good ? value : 1, machine.S->Xcr0);
        Assert.Equal(Fault.None, machine.Run(Xgetbv));
        Assert.Equal(machine.S->Xcr0, machine.S->Gpr[0]);
    }

    [Fact]
    public void Reserved_bits_of_mxcsr_raise_GP()
    {
        using VectorMachine machine = new();
        *(uint*)machine.At(VectorMachine.Data) = 0x8000_1f80;
        Assert.Equal((byte)ExceptionVector.GeneralProtection, machine.Run(0x0f, 0xae, 0x15, 0, 0, 0x11, 0));
        Assert.Equal(0x1f80u, machine.S->Mxcsr);
    }

    [Fact]
    public void All_state_crosses_out_and_in()
    {
        Assert.SkipUnless(HostFeatures.Avx, "the host has no AVX");
        using VectorMachine machine = new();
        FillRegisters(machine, 11);
        machine.S->Mxcsr = 0x3fa1;
        machine.Run(0xd9, 0xeb);
        machine.Vcpu.GetState(out CpuState state);
        using VectorMachine other = new();
        other.Vcpu.SetState(in state);
        Assert.Equal(new ReadOnlySpan<byte>(machine.S->Vector, 512).ToArray(), new ReadOnlySpan<byte>(other.S->Vector, 512).ToArray());
        Assert.Equal(new ReadOnlySpan<byte>(machine.S->X87, 160).ToArray(), new ReadOnlySpan<byte>(other.S->X87, 160).ToArray());
        Assert.Equal(0x3fa1u, other.S->Mxcsr);
        Assert.Equal(machine.S->FpuIp, other.S->FpuIp);
        Assert.Equal(machine.S->FpuCs, other.S->FpuCs);
        other.Vcpu.GetState(out CpuState again);
        for (int i = 0; i < 104; i++)
            Assert.Equal(state.Xsave[i], again.Xsave[i]);
    }

    [Fact]
    public void Mmx_registers_are_the_x87_ones()
    {
        using VectorMachine machine = new();
        machine.Run(0xd9, 0xe8);
        machine.Run(0xd9, 0xeb);
        machine.S->Gpr[0] = 0x1234_5678;
        Assert.Equal(Fault.None, machine.Run(0x0f, 0x6e, 0xd8));
        Assert.Equal(0, X87State.Status(machine.S) & X87State.TopMask);
        Assert.Equal(0xff, X87State.Tags(machine.S));
        Assert.Equal(0x1234_5678ul, *(ulong*)X87State.Register(machine.S, 3));
        Assert.Equal(0xffff, *(ushort*)(X87State.Register(machine.S, 3) + 8));
        Assert.Equal(0x8000_0000_0000_0000, *(ulong*)X87State.Register(machine.S, 7));
        Assert.Equal(0xc90f_daa2_2168_c235, *(ulong*)X87State.Register(machine.S, 6));
        Assert.Equal(Fault.None, machine.Run(0x0f, 0x77));
        Assert.Equal(0, X87State.Tags(machine.S));
    }

    [Fact]
    public void Vectors_go_to_and_from_devices()
    {
        using VectorMachine machine = new();
        Assert.Equal(Fault.None, machine.Run(0x0f, 0x28, 0x05, 0x10, 0, 0, 0xf0));
        Assert.Equal(0x1716_1514_1312_1110ul, *(ulong*)machine.S->Vector);
        Assert.Equal(0x1f1e_1d1c_1b1a_1918ul, *(ulong*)(machine.S->Vector + 8));
        Assert.Equal(Fault.None, machine.Run(0x0f, 0x29, 0x05, 0x80, 0, 0, 0xf0));
        Assert.Equal(0x10, machine.Registers[0x80]);
        Assert.Equal(0x1f, machine.Registers[0x8f]);
        Assert.Equal(0x90, machine.Registers[0x90]);
    }

    [Theory]
    [InlineData(VectorMachine.Data + 8)]
    [InlineData(VectorMachine.Data + 4093)]
    [InlineData((uint)VectorMachine.Device + 8)]
    public void Compare_exchange_works_anywhere(uint place)
    {
        using VectorMachine machine = new();
        for (uint i = 0; i < 0x2000; i++)
            machine.At(VectorMachine.Data)[i] = (byte)i;
        byte[] code = [0xf0, 0x0f, 0xc7, 0x0d, .. BitConverter.GetBytes(place)];
        Assert.Equal(Fault.None, machine.Run(code));
        ulong found = machine.S->Gpr[0] | machine.S->Gpr[2] << 32;
        Assert.Equal((byte)place, (byte)found);
        Assert.Equal((byte)(place + 7), (byte)(found >> 56));
        Assert.False(LazyFlags.Zero(machine.S));
        machine.S->Gpr[3] = 0xaabb_ccdd;
        machine.S->Gpr[1] = 0x1122_3344;
        Assert.Equal(Fault.None, machine.Run(code));
        Assert.True(LazyFlags.Zero(machine.S));
        Assert.Equal(Fault.None, machine.Run(code));
        Assert.False(LazyFlags.Zero(machine.S));
        Assert.Equal(0xaabb_ccddul, machine.S->Gpr[0]);
        Assert.Equal(0x1122_3344ul, machine.S->Gpr[2]);
    }

    [Fact]
    public void Sixteen_bytes_are_exchanged_atomically_or_not_at_all()
    {
        ulong* place = stackalloc ulong[4];
        place = (ulong*)(((nint)place + 15) & ~15);
        place[0] = 1;
        place[1] = 2;
        ulong* expected = stackalloc ulong[2];
        ulong* value = stackalloc ulong[2];
        expected[0] = 1;
        expected[1] = 3;
        value[0] = 5;
        value[1] = 6;
        Assert.False(WideCompareExchange.TryExchange16((byte*)place, expected, value));
        Assert.Equal(2ul, expected[1]);
        Assert.Equal(1ul, place[0]);
        Assert.True(WideCompareExchange.TryExchange16((byte*)place, expected, value));
        Assert.Equal(5ul, place[0]);
        Assert.Equal(6ul, place[1]);
    }

    private static void FillRegisters(VectorMachine machine, int seed)
    {
        Random random = new(seed);
        random.NextBytes(new Span<byte>(machine.S->Vector, 256));
    }
}
