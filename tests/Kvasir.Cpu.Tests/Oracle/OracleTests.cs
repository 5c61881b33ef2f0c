using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text.RegularExpressions;
using Xunit;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>
/// The host's processor as oracle. KVASIR_ORACLE_CASES sets the cases of each form (default: a few hundred), KVASIR_ORACLE_SEED the seed,
/// KVASIR_ORACLE_BLOCKS the number of blocks, KVASIR_ORACLE_FORMS a regular expression of the forms to run, KVASIR_ORACLE_REPLAY one case as a failure prints it,
/// (KVASIR_ORACLE_TRANSLATE=1: translated), KVASIR_ORACLE_TRACE a file that names the case under way should the process crash.
/// </summary>
public sealed class OracleTests(ITestOutputHelper output)
{
    private const ulong DefaultSeed = 1;

    [Theory]
    [InlineData(64, 400, false)]
    [InlineData(32, 200, false)]
    [InlineData(16, 100, false)]
    [InlineData(64, 100, true)]
    [InlineData(32, 50, true)]
    [InlineData(16, 25, true)]
    public void Instructions_do_what_the_host_does(int mode, int cases, bool translate)
    {
        SkipWithoutOracle();
        List<Form> forms = Chosen(mode);
        Assert.SkipWhen(forms.Count == 0, "no form of this mode was asked for");
        using Campaign campaign = Start(Setting("KVASIR_ORACLE_SEED", DefaultSeed), translate);
        campaign.Run(forms, (int)Setting("KVASIR_ORACLE_CASES", (ulong)cases));
        string summary = campaign.Summary(limit: 400);
        output.WriteLine(summary);
        Assert.True(campaign.Judged > 0, "no case was judged");
        Assert.True(campaign.Failures.Count == 0, summary);
    }

    /// <summary>Blocks of up to thirty instructions with branches, loops, faults and page crossings, through the block cache.</summary>
    [Theory]
    [InlineData(64, 12_000, false)]
    [InlineData(32, 6_000, false)]
    [InlineData(16, 3_000, false)]
    [InlineData(64, 12_000, true)]
    [InlineData(32, 6_000, true)]
    [InlineData(16, 3_000, true)]
    public void Blocks_do_what_the_host_does(int mode, int cases, bool translate)
    {
        SkipWithoutOracle();
        using Campaign campaign = Start(Setting("KVASIR_ORACLE_SEED", DefaultSeed), translate);
        campaign.Run([new Form(mode, Iced.Intel.Code.INVALID)], (int)Setting("KVASIR_ORACLE_BLOCKS", (ulong)cases));
        string summary = campaign.Summary(limit: 10);
        output.WriteLine(summary);
        Assert.True(campaign.Judged > 0, "no block was judged");
        Assert.True(campaign.Failures.Count == 0, summary);
    }

    [Theory]
    [InlineData(64)]
    [InlineData(32)]
    [InlineData(16)]
    public void The_host_agrees_with_itself(int mode)
    {
        SkipWithoutOracle();
        List<Form> forms = Chosen(mode);
        Assert.SkipWhen(forms.Count == 0, "no form of this mode was asked for");
        using Campaign campaign = Start(Setting("KVASIR_ORACLE_SEED", DefaultSeed), translate: false);
        campaign.RunHostTwice(forms);
        Assert.True(campaign.Judged > 0, "no case was judged");
        Assert.True(campaign.Failures.Count == 0, campaign.Summary(limit: 20));
    }

    [Fact]
    public void Replay()
    {
        string? line = Environment.GetEnvironmentVariable("KVASIR_ORACLE_REPLAY");
        Assert.SkipWhen(string.IsNullOrEmpty(line), "KVASIR_ORACLE_REPLAY names no case");
        SkipWithoutOracle();
        string[] parts = line.Split('/');
        Assert.True(parts.Length == 4, "a case is MODE/FORM/SEED/NUMBER");
        Form form = Form.Parse(parts[0], parts[1]);
        using Campaign campaign = Start(ulong.Parse(parts[2], CultureInfo.InvariantCulture), Setting("KVASIR_ORACLE_TRANSLATE", 0) != 0);
        output.WriteLine(campaign.Replay(form, ulong.Parse(parts[3], CultureInfo.InvariantCulture)));
    }

    private static unsafe Campaign Start(ulong seed, bool translate) =>
        new(seed, area => new SoftRunner(area.Pristine, translate), Environment.GetEnvironmentVariable("KVASIR_ORACLE_TRACE"));

    private static List<Form> Chosen(int mode)
    {
        List<Form> forms = Forms.All(mode);
        string? pattern = Environment.GetEnvironmentVariable("KVASIR_ORACLE_FORMS");
        return string.IsNullOrEmpty(pattern) ? forms : [.. forms.Where(f => Regex.IsMatch(f.ToString(), pattern))];
    }

    private static ulong Setting(string name, ulong otherwise)
    {
        string? text = Environment.GetEnvironmentVariable(name);
        return string.IsNullOrEmpty(text) ? otherwise : ulong.Parse(text, CultureInfo.InvariantCulture);
    }

    private static void SkipWithoutOracle()
    {
        string? obstacle = NativeRunner.Obstacle();
        Assert.SkipWhen(obstacle != null, obstacle ?? "");
    }
}
