using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text.RegularExpressions;
using Iced.Intel;
using Kvasir.Cpu.Tests.Oracle;
using Xunit;

namespace Kvasir.Kvm.Tests;

/// <summary>
/// The oracle's cases in guests, as user programs and in kernels, compared with the host's processor. KVASIR_ORACLE_SEED, KVASIR_ORACLE_CASES and KVASIR_ORACLE_BLOCKS as
/// for the software CPU, which has its own turn here: exceptions, too, go through the guest's handlers.
/// </summary>
[Collection(Rig.OneAtATime)]
public sealed partial class OracleTests(ITestOutputHelper output)
{
    public static TheoryData<bool, CasePlace, int> Places()
    {
        TheoryData<bool, CasePlace, int> rows = [];
        foreach (bool kvm in (ReadOnlySpan<bool>)[false, true])
        {
            foreach (int mode in (ReadOnlySpan<int>)[64, 32, 16])
                rows.Add(kvm, CasePlace.Ring3, mode);
            rows.Add(kvm, CasePlace.Long, 64);
            rows.Add(kvm, CasePlace.Protected, 32);
            rows.Add(kvm, CasePlace.Protected, 16);
            rows.Add(kvm, CasePlace.Real, 16);
        }
        return rows;
    }

    [Theory]
    [MemberData(nameof(Places))]
    public void Instructions_do_what_the_host_does(bool kvm, CasePlace place, int mode)
    {
        RequireOracle(kvm, place, mode);
        List<Form> forms = Forms.All(mode);
        forms.RemoveAll(form => !KernelMachine.Runs(place, form) || (kvm && !Rig.Probe.IsHardware && IsBeyondEmulation(place, form)));
        Run(kvm, place, forms, Setting("KVASIR_ORACLE_CASES", 5));
    }

    [Theory]
    [MemberData(nameof(Places))]
    public void Blocks_do_what_the_host_does(bool kvm, CasePlace place, int mode)
    {
        RequireOracle(kvm, place, mode);
        Run(kvm, place, [new Form(mode, Code.INVALID)], Setting("KVASIR_ORACLE_BLOCKS", 1000));
    }

    private unsafe void Run(bool kvm, CasePlace place, IReadOnlyList<Form> forms, int cases)
    {
        bool emulates = kvm && !Rig.Probe.IsHardware;
        using Campaign campaign = new((ulong)Setting("KVASIR_ORACLE_SEED", 1), area => new GuestRunner(area.Pristine, place, kvm), leavesOut: record => LeavesOut(place, emulates, record));
        campaign.Run(forms, cases);
        string summary = campaign.Summary(limit: 60);
        output.WriteLine(summary);
        Assert.True(campaign.Judged > 0, "no case was judged");
        Assert.True(campaign.Failures.Count == 0, summary);
    }

    /// <summary>
    /// Where KVM emulates kernels, what faults in ring 3 is executed once more by its emulator, which does not tell #GP from #SS and knows few instructions. In a
    /// kernel, what faults for a user program does not, or has another error code, but for #DE, #UD, #MF and #XM.
    /// </summary>
    private static unsafe bool LeavesOut(CasePlace place, bool emulates, OracleRecord* record)
    {
        if (record->Vector != OracleRecord.NoVector && (emulates || (place != CasePlace.Ring3 && record->Vector is not (0 or 6 or 16 or 19))))
            return true;
        if (place == CasePlace.Ring3)
            return false;
        Decoder decoder = Decoder.Create((int)record->Mode, new ReadOnlySpan<byte>(record->Code, (int)record->CodeLength).ToArray(), DecoderOptions.AMD);
        foreach (Instruction instruction in decoder)
        {
            Form form = new((int)record->Mode, instruction.Code);
            if (!KernelMachine.Runs(place, form) || (emulates && IsBeyondEmulation(place, form)))
                return true;
        }
        return false;
    }

    /// <summary>
    /// A KVM that emulates kernels keeps its own descriptor tables in the processor: user programs load segments from those. In kernels its emulator does as Intel's
    /// processors and not as AMD's do (66h before branches of 64-bit code, LFS and LGS with REX.W), takes LZCNT and TZCNT for BSR and BSF, and does not know MOVBE;
    /// a CMPXCHG of 32 bits that fails clears the register's upper half, FXSAVE writes other reserved bytes, ENTER with 66h a frame of the other width, AAM and
    /// AAD set flags otherwise, and no operations with 16-bit addresses are too long.
    /// </summary>
    private static bool IsBeyondEmulation(CasePlace place, Form form) =>
        place == CasePlace.Ring3 ? LoadsOrReadsDescriptors().IsMatch(form.ToString()) : EmulatedOtherwise().IsMatch(form.ToString());

    [GeneratedRegex("_Sreg|/(Verr|Verw|Lar|Lsl|Lss|Lfs|Lgs)_|_(FS|GS)$")]
    private static partial Regex LoadsOrReadsDescriptors();

    [GeneratedRegex("^64/(.*_rel8_16|.*_rel16|Retnw|Call_rm16|Jmp_rm16|L[fg]s_r64|Cmpxchg_rm32|Fxsave)|/(Enter[wd]|Reservednop|Cldemote|Aam|Aad|Tzcnt|Lzcnt|Movbe)_")]
    private static partial Regex EmulatedOtherwise();

    private static void RequireOracle(bool kvm, CasePlace place, int mode)
    {
        if (kvm)
            Rig.RequireKvm();
        Assert.SkipWhen(NativeRunner.Obstacle() is not null, NativeRunner.Obstacle() ?? "");
        Assert.SkipWhen(kvm && place == CasePlace.Ring3 && mode != 64 && !Rig.Probe.IsHardware, "this host's KVM emulates kernels and runs no 32-bit code in ring 3 under a 64-bit kernel");
    }

    private static int Setting(string name, int otherwise)
    {
        string? text = Environment.GetEnvironmentVariable(name);
        return string.IsNullOrEmpty(text) ? otherwise : int.Parse(text, CultureInfo.InvariantCulture);
    }
}
