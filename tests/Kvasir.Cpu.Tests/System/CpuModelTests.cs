using System;
using System.Runtime.Intrinsics.X86;
using System.Text;
using Kvasir.X86;
using Xunit;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Models by name, features by name, and what CPUID then says.</summary>
public class CpuModelTests
{
    private const uint Edx1Baseline = 0x078b_fbff & ~(1u << 28);

    private static CpuidResult Leaf(CpuModel model, uint leaf, uint subleaf = 0, uint apicId = 0, ulong xcr0 = 1, bool osxsave = false) =>
        model.Cpuid(leaf, subleaf, apicId, osxsave, xcr0);

    [Fact]
    public void Host_keeps_vendor_and_signature()
    {
        CpuModel model = CpuModel.Parse("host");
        (int _, int b, int c, int d) = X86Base.CpuId(0, 0);
        CpuidResult leaf = Leaf(model, 0);
        Assert.Equal(((uint)b, (uint)c, (uint)d), (leaf.Ebx, leaf.Ecx, leaf.Edx));
        Assert.Equal((uint)X86Base.CpuId(1, 0).Eax, model.Signature);
        Assert.Equal(model.Signature, Leaf(model, 1).Eax);
    }

    [Fact]
    public void Host_never_offers_what_the_host_lacks_or_nobody_handles()
    {
        CpuModel model = CpuModel.Parse("host");
        (_, int b7, int c7, _) = X86Base.CpuId(7, 0);
        const uint bmi1 = 1 << 3;
        const uint avx2 = 1 << 5;
        const uint sha = 1 << 29;
        CpuidResult leaf = Leaf(model, 7);
        Assert.Equal(0u, leaf.Ebx & (bmi1 | avx2 | sha) & ~(uint)b7);
        Assert.Equal(0u, leaf.Ebx & 1u << 16);
        Assert.Equal(0u, leaf.Ecx & (1u << 3 | 1u << 16));
        Assert.Equal(0u, leaf.Ecx & (1u << 8 | 1u << 9 | 1u << 10) & ~(uint)c7);
    }

    [Theory]
    [InlineData("x86-64-v1")]
    [InlineData("x86-64-v2")]
    [InlineData("qemu64")]
    public void Levels_have_the_baseline(string name)
    {
        CpuModel model = CpuModel.Parse(name);
        CpuidResult leaf = Leaf(model, 1);
        Assert.Equal(Edx1Baseline, leaf.Edx & Edx1Baseline);
        Assert.True(model.Has(CpuFeature.LongMode));
        Assert.True(model.Has(CpuFeature.Nx));
        Assert.Equal(name == "x86-64-v2", model.Has(CpuFeature.Sse42));
        Assert.False(model.Has(CpuFeature.Avx));
    }

    [Fact]
    public void Features_come_and_go()
    {
        CpuModel model = CpuModel.Parse("max,-smap,-rdrand");
        Assert.False(model.Has(CpuFeature.Smap));
        Assert.False(model.Has(CpuFeature.Rdrand));
        Assert.Equal(Cr4.None, model.AllowedCr4 & Cr4.SMAP);
        Assert.True(CpuModel.Parse("x86-64-v1,+sse4_1").Has(CpuFeature.Sse41));
        Assert.True(CpuModel.Parse("x86-64-v1,+tsc_adjust").Has(CpuFeature.TscAdjust));
    }

    [Fact]
    public void Dropping_xsave_drops_what_builds_on_it()
    {
        CpuModel model = CpuModel.Parse("max,-xsave");
        Assert.False(model.Has(CpuFeature.Avx));
        Assert.False(model.Has(CpuFeature.Avx2));
        Assert.Equal(1ul, model.AllowedXcr0);
        Assert.Equal(default, Leaf(model, 0xd));
    }

    [Theory]
    [InlineData("pentium9", "no CPU model 'pentium9'")]
    [InlineData("", "no CPU model ''")]
    [InlineData("max,+warp", "no CPU feature 'warp'")]
    [InlineData("max,avx", "'avx' is no change")]
    [InlineData("max,+", "'+' is no change")]
    public void Bad_specifications_say_what_is_wrong(string specification, string message)
    {
        CpuModelException error = Assert.Throws<CpuModelException>(() => CpuModel.Parse(specification));
        Assert.StartsWith(message, error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Osxsave_follows_cr4_and_the_save_area_follows_xcr0()
    {
        CpuModel model = CpuModel.Parse("host");
        Assert.SkipUnless(model.Has(CpuFeature.Avx), "the host has no AVX");
        const uint osxsave = 1 << 27;
        Assert.Equal(0u, Leaf(model, 1).Ecx & osxsave);
        Assert.Equal(osxsave, Leaf(model, 1, osxsave: true).Ecx & osxsave);
        Assert.Equal((7u, 576u, 832u), (Leaf(model, 0xd).Eax, Leaf(model, 0xd).Ebx, Leaf(model, 0xd).Ecx));
        Assert.Equal(832u, Leaf(model, 0xd, xcr0: 7).Ebx);
        Assert.Equal((256u, 576u), (Leaf(model, 0xd, 2).Eax, Leaf(model, 0xd, 2).Ebx));
    }

    [Theory]
    [InlineData(1, 0)]
    [InlineData(2, 1)]
    [InlineData(3, 2)]
    [InlineData(4, 2)]
    [InlineData(64, 6)]
    [InlineData(255, 8)]
    public void Topology_has_room_for_every_vcpu(int vcpus, int bits)
    {
        CpuModel model = CpuModel.Parse("host", vcpus);
        uint last = (uint)vcpus - 1;
        CpuidResult core = Leaf(model, 0xb, 1, last);
        Assert.Equal(((uint)bits, (uint)vcpus, last), (core.Eax, core.Ebx, core.Edx));
        Assert.Equal(last, Leaf(model, 1, 0, last).Ebx >> 24);
        Assert.Equal(vcpus > 1, (Leaf(model, 1).Edx & 1u << 28) != 0);
        Assert.Equal(0u, Leaf(model, 0xb, 2, last).Ebx);
    }

    [Fact]
    public void Brand_and_hypervisor_signature_read_as_text()
    {
        CpuModel model = CpuModel.Parse("EPYC");
        Assert.True(model.IsAmd);
        byte[] brand = new byte[48];
        for (uint i = 0; i < 3; i++)
        {
            CpuidResult r = Leaf(model, 0x8000_0002 + i);
            Buffer.BlockCopy(new[] { r.Eax, r.Ebx, r.Ecx, r.Edx }, 0, brand, (int)i * 16, 16);
        }
        Assert.Equal("AMD EPYC Processor", Encoding.ASCII.GetString(brand).TrimEnd('\0'));
        CpuidResult hypervisor = Leaf(model, 0x4000_0000);
        byte[] name = new byte[12];
        Buffer.BlockCopy(new[] { hypervisor.Ebx, hypervisor.Ecx, hypervisor.Edx }, 0, name, 0, 12);
        Assert.Equal("KvasirKvasir", Encoding.ASCII.GetString(name));
    }

    [Theory]
    [InlineData(1_000_000_000ul)]
    [InlineData(2_500_000_000ul)]
    [InlineData(999_999_999ul)]
    public void Intel_leaf_15h_gives_the_frequency(ulong frequency)
    {
        CpuModel model = CpuModel.Parse("Skylake-Client", 1, frequency);
        Assert.False(model.IsAmd);
        CpuidResult leaf = Leaf(model, 0x15);
        Assert.Equal(frequency, (ulong)leaf.Ecx * leaf.Ebx / leaf.Eax);
        Assert.Equal((uint)(frequency / 1000), Leaf(model, 0x4000_0010).Eax);
    }

    [Fact]
    public void Every_leaf_of_every_model_can_be_asked()
    {
        foreach (string name in new[] { "host", "max", "x86-64-v1", "Nehalem", "EPYC" })
        {
            CpuModel model;
            try
            {
                model = CpuModel.Parse(name);
            }
            catch (CpuModelException lacking)
            {
                Assert.Contains("the host's processor lacks", lacking.Message, StringComparison.Ordinal);
                continue;
            }
            for (uint leaf = 0; leaf < 0x40; leaf++)
            {
                for (uint subleaf = 0; subleaf < 4; subleaf++)
                {
                    Leaf(model, leaf, subleaf);
                    Leaf(model, 0x8000_0000 + leaf, subleaf);
                    Leaf(model, 0x4000_0000 + leaf, subleaf);
                }
            }
            Assert.Equal(default, Leaf(model, 0xffff_ffff));
        }
    }
}
