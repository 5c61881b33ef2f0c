using System;
using System.IO;
using System.Linq;
using System.Threading;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using Kvasir.Linux;
using Kvasir.Machine;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>Hosts without KVM, with a broken one, and what is left behind on a good one.</summary>
[Collection(Rig.OneAtATime)]
public class HostTests
{
    [Fact]
    public void A_missing_device_is_explained()
    {
        KvmProbe probe = KvmProbe.Run(path: "/dev/kvm-that-is-not-there");
        Assert.Contains("is missing", probe.Problem, StringComparison.Ordinal);
        Assert.NotNull(probe.Fix);
        (bool kvm, string reason) = Accelerators.Decide(probe);
        Assert.False(kvm);
        Assert.Equal("soft (kvm: /dev/kvm-that-is-not-there is missing)", reason);
    }

    [Fact]
    public void A_device_that_is_no_kvm_is_explained()
    {
        KvmProbe probe = KvmProbe.Run(path: "/dev/null");
        Assert.Equal("/dev/null is no KVM device", probe.Problem);
    }

    [Theory]
    [InlineData(13, "may not be opened", "usermod -aG kvm")]
    [InlineData(16, "another hypervisor", "stop the other hypervisor")]
    [InlineData(19, "no KVM module", "")]
    public void A_device_that_cannot_be_opened_is_explained(int error, string problem, string fix)
    {
        KvmProbe probe = KvmProbe.Run(new FailingCalls(0, error));
        Assert.Contains(problem, probe.Problem, StringComparison.Ordinal);
        Assert.Contains(fix, probe.Fix, StringComparison.Ordinal);
    }

    [Fact]
    public void Slow_kernels_are_left_to_the_software_cpu()
    {
        (bool kvm, string reason) = Accelerators.Decide(new KvmProbe(null, null, 1.3e6, 2_000_000_000, []));
        Assert.False(kvm);
        Assert.Equal("soft (kvm: ring-0 code runs at 1.3 M instructions/s here)", reason);
        Assert.True(Accelerators.Decide(new KvmProbe(null, null, 1e12, 2_000_000_000, [])).Kvm);
    }

    [Fact]
    public void Each_call_that_fails_gives_a_clear_error_and_leaks_nothing()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Mix("real", 3);
        FailingCalls counting = new(int.MaxValue, 0);
        Attempt(counting, test);
        Assert.Equal(0, counting.Open);
        Assert.True(counting.Count > 30);
        for (int i = 0; i < counting.Count; i++)
        {
            FailingCalls calls = new(i, 5);
            string? error = Attempt(calls, test);
            Assert.Equal(0, calls.Open);
            // How often the vCPU is entered is up to signals that come, so the last of the calls need not come each time.
            if (!calls.Fired)
            {
                Assert.True(i > counting.Count * 9 / 10, $"call {i} of {counting.Count} was not reached");
                break;
            }
            // A capability or a register that KVM does not take is done without.
            if (error is not null)
                Assert.True(error.Length > 10 && error.Contains("error", StringComparison.OrdinalIgnoreCase), $"call {i}: {error}");
        }
    }

    [Fact]
    public void No_kick_is_lost()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Long(a =>
        {
            Label here = a.CreateLabel();
            a.Label(ref here);
            a.jmp(here);
        }).Build("endless");
        using Rig rig = new();
        rig.Load(test);
        int returned = 0;
        const int kicks = 300;
        Thread runner = new(() =>
        {
            for (int i = 0; i < kicks; i++)
            {
                if (rig.Vcpu.Run() != VcpuExit.Kicked)
                    return;
                Interlocked.Increment(ref returned);
            }
        });
        runner.Start();
        for (int i = 0; i < kicks; i++)
        {
            // Each kick meets the vCPU elsewhere: before, inside and after KVM_RUN.
            rig.Vcpu.Kick();
            int before = i;
            Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref returned) > before, TimeSpan.FromSeconds(120)), $"kick {i} was lost");
            Thread.SpinWait(i * 37 % 20_000);
        }
        Assert.True(runner.Join(TimeSpan.FromSeconds(120)));
    }

    [Fact]
    public void Wakes_from_hlt_by_a_kick_and_an_nmi()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Long(a => a.hlt()).Expect("the vector", SystemBuilder.Slot(0), 8, 2).Build("NMI in HLT");
        using Rig rig = new();
        rig.Load(test);
        using (Timer kick = new(static v => ((IVcpu)v!).Kick(), rig.Vcpu, 20, Timeout.Infinite))
            Assert.Equal(VcpuExit.Kicked, rig.Vcpu.Run());
        rig.Vcpu.GetState(out CpuState state);
        Assert.Equal(VcpuActivity.Halted, state.Activity);
        rig.Vcpu.Nmi();
        Assert.Equal(SystemEnd.Exit, rig.Run());
        GuestTests.Check(rig, test);
    }

    [Fact]
    public void Many_vms_leave_nothing_behind()
    {
        Rig.RequireKvm();
        SystemCase test = Programs.Mix("real", 3);
        RunOnce(test);
        (int files, int maps) before = Count();
        for (int i = 0; i < 200; i++)
            RunOnce(test);
        (int files, int maps) after = Count();
        Assert.Equal(before.files, after.files);
        // The garbage collector and the compiler map a little now and then; a VM that leaked would map hundreds.
        Assert.True(after.maps - before.maps < 100, $"{before.maps} mappings became {after.maps}");
        // KVM starts a thread of its own in the process for each VM; it ends with the VM.
        Assert.DoesNotContain(Directory.GetDirectories("/proc/self/task"), task => ThreadName(task).StartsWith("kvm-", StringComparison.Ordinal));
        Assert.DoesNotContain("kvm-test", File.ReadAllText("/proc/self/maps"), StringComparison.Ordinal);
    }

    private static string ThreadName(string task)
    {
        try
        {
            return File.ReadAllText(Path.Combine(task, "comm"));
        }
        catch (IOException)
        {
            // It ended meanwhile.
            return "";
        }
    }

    private static void RunOnce(SystemCase test)
    {
        using Rig rig = new();
        rig.Load(test);
        Assert.Equal(SystemEnd.Exit, rig.Run());
    }

    private static (int Files, int Maps) Count() =>
        (Directory.GetFileSystemEntries("/proc/self/fd").Length, File.ReadLines("/proc/self/maps").Count());

    private static string? Attempt(FailingCalls calls, SystemCase test)
    {
        try
        {
            using Rig rig = new(calls: calls);
            rig.Load(test);
            VcpuExit exit = rig.Vcpu.Run();
            return exit == VcpuExit.Failure ? rig.Vcpu.FailureReport : null;
        }
        catch (LinuxException e)
        {
            return e.Message;
        }
    }
}
