using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text.RegularExpressions;
using Kvasir.Cpu.Tests.Oracle;
using Xunit;

namespace Kvasir.Kvm.Tests;

/// <summary>
/// The oracle's cases as user programs of a KVM guest, compared with the host's processor. KVASIR_ORACLE_SEED, KVASIR_ORACLE_CASES and KVASIR_ORACLE_BLOCKS as for
/// the software CPU.
/// </summary>
[Collection(Rig.OneAtATime)]
public sealed partial class OracleTests(ITestOutputHelper output)
{
    [Theory]
    [InlineData(64, 5)]
    [InlineData(32, 5)]
    [InlineData(16, 5)]
    public void Instructions_do_what_the_host_does(int mode, int cases)
    {
        RequireOracle(mode);
        List<Form> forms = Forms.All(mode);
        // A KVM that emulates kernels keeps its own descriptor tables in the processor: user programs load segments from those.
        if (!Rig.Probe.IsHardware)
            forms.RemoveAll(form => LoadsOrReadsDescriptors().IsMatch(form.ToString()));
        Run(forms, Setting("KVASIR_ORACLE_CASES", cases));
    }

    [Theory]
    [InlineData(64, 2000)]
    [InlineData(32, 1000)]
    [InlineData(16, 500)]
    public void Blocks_do_what_the_host_does(int mode, int cases)
    {
        RequireOracle(mode);
        Run([new Form(mode, Iced.Intel.Code.INVALID)], Setting("KVASIR_ORACLE_BLOCKS", cases));
    }

    private unsafe void Run(IReadOnlyList<Form> forms, int cases)
    {
        // There, too, what faults in ring 3 is executed once more by KVM's emulator, which does not tell #GP from #SS and knows few instructions.
        using Campaign campaign = new((ulong)Setting("KVASIR_ORACLE_SEED", 1), area => new KvmRunner(area.Pristine), leavesOut: Rig.Probe.IsHardware ? null : vector => vector != OracleRecord.NoVector);
        campaign.Run(forms, cases);
        string summary = campaign.Summary(limit: 60);
        output.WriteLine(summary);
        Assert.True(campaign.Judged > 0, "no case was judged");
        Assert.True(campaign.Failures.Count == 0, summary);
    }

    [GeneratedRegex("_Sreg|/(Verr|Verw|Lar|Lsl|Lss|Lfs|Lgs)_|_(FS|GS)$")]
    private static partial Regex LoadsOrReadsDescriptors();

    private static void RequireOracle(int mode)
    {
        Rig.RequireKvm();
        Assert.SkipWhen(NativeRunner.Obstacle() is not null, NativeRunner.Obstacle() ?? "");
        Assert.SkipWhen(mode != 64 && !Rig.Probe.IsHardware, "this host's KVM emulates kernels and runs no 32-bit code in ring 3 under a 64-bit kernel");
    }

    private static int Setting(string name, int otherwise)
    {
        string? text = Environment.GetEnvironmentVariable(name);
        return string.IsNullOrEmpty(text) ? otherwise : int.Parse(text, CultureInfo.InvariantCulture);
    }
}
