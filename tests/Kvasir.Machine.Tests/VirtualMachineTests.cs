using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Machine.Tests;

public sealed class VirtualMachineTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(120);

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    [Fact]
    public async Task PowerOffFromInsideAnInstructionEndsTheVm()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 2);
        using (vm)
        {
            vm.Start();
            // The second one's thread may begin late: it has run once before the end comes.
            TaskCompletionSource begun = new(TaskCreationOptions.RunContinuationsAsynchronously);
            board[1].Execute(begun.SetResult);
            await begun.Task.WaitAsync(Patience, Token);
            board[0].Execute(board.Power.PowerOff);
            VmOutcome outcome = await vm.Outcome.WaitAsync(Patience, Token);
            Assert.Equal(new VmOutcome(VmEnd.PoweredOff), outcome);
            Assert.Equal(VmState.Finished, vm.State);
            Assert.False(board[0].Running || board[1].Running);
            Assert.Equal("vcpu0", board[0].ThreadName);
            Assert.Equal("vcpu1", board[1].ThreadName);
        }
        Assert.True(board.Disposed);
    }

    [Fact]
    public async Task AGuestThatExitsRunsNothingAfterIt()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            bool ranOn = false;
            board[0].Execute(() => board.Power.Exit(85));
            board[0].Execute(() => ranOn = true);
            vm.Start();
            Assert.Equal(new VmOutcome(VmEnd.GuestExit, 85), await vm.Outcome.WaitAsync(Patience, Token));
            Assert.False(ranOn);
        }
    }

    [Fact]
    public async Task TheFirstEndCounts()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            board[0].Execute(() =>
            {
                board.Power.Exit(3);
                board.Power.PowerOff();
                board.Power.Reset();
            });
            vm.Start();
            Assert.Equal(VmEnd.GuestExit, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            Assert.Equal(1, board.Resets);
        }
    }

    [Fact]
    public async Task AGuestsResetStopsAllVcpusAndStartsAgain()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 3);
        using (vm)
        {
            vm.Start();
            using SemaphoreSlim reset = new(0);
            board.OnReset = () => reset.Release();
            board[1].Execute(() =>
            {
                // Two reset lines pulled by one write (the i8042 and a triple of retries, as kernels do) are one reset.
                board.Power.Reset();
                board.Power.Reset();
            });
            Assert.True(await reset.WaitAsync(Patience, Token));
            board[2].Execute(board.Power.PowerOff);
            Assert.Equal(VmEnd.PoweredOff, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            Assert.Equal(2, board.Resets);
            Assert.False(board.VcpuRanDuringReset);
        }
    }

    [Fact]
    public async Task NoRebootTurnsAResetIntoTheEnd()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(noReboot: true);
        using (vm)
        {
            vm.Start();
            board[0].Execute(board.Power.Reset);
            Assert.Equal(VmEnd.Reset, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            Assert.Equal(1, board.Resets);
        }
    }

    [Fact]
    public async Task PauseStopsTimeAndInstructionsAndResumeLetsThemGoOn()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 2);
        using (vm)
        {
            vm.Start();
            vm.Pause();
            Assert.Equal(VmState.Paused, vm.State);
            Assert.False(board.Clock.Running);
            ulong before = board[0].InstructionsRetired;
            using SemaphoreSlim executed = new(0);
            board[0].Execute(() => executed.Release());
            Assert.False(await executed.WaitAsync(50, Token));
            Assert.Equal(before, board[0].InstructionsRetired);
            vm.Resume();
            Assert.True(await executed.WaitAsync(Patience, Token));
            Assert.True(board.Clock.Running);
            Assert.Equal(VmState.Running, vm.State);
        }
    }

    [Fact]
    public async Task AResetOfAPausedVmLeavesItPaused()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            vm.Start(paused: true);
            Assert.Equal(VmState.Paused, vm.State);
            vm.Reset();
            Assert.Equal(2, board.Resets);
            Assert.Equal(VmState.Paused, vm.State);
            using SemaphoreSlim executed = new(0);
            board[0].Execute(() => executed.Release());
            Assert.False(await executed.WaitAsync(50, Token));
            vm.Resume();
            Assert.True(await executed.WaitAsync(Patience, Token));
        }
    }

    [Theory]
    [InlineData(VcpuExit.TripleFault, VmEnd.TripleFault)]
    [InlineData(VcpuExit.Failure, VmEnd.Failure)]
    public async Task ACrashCarriesItsReport(VcpuExit exit, VmEnd end)
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 2);
        using (vm)
        {
            vm.Start();
            board[1].Execute(() => exit);
            Assert.Equal(new VmOutcome(end, Report: "report of vCPU 1"), await vm.Outcome.WaitAsync(Patience, Token));
        }
    }

    [Fact]
    public async Task ADefectInAVcpuEndsTheVmAndNotTheProcess()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 2);
        using (vm)
        {
            vm.Start();
            board[0].Execute(() => throw new InvalidOperationException("defect"));
            VmOutcome outcome = await vm.Outcome.WaitAsync(Patience, Token);
            Assert.Equal(VmEnd.Failure, outcome.End);
            Assert.Contains("vcpu0", outcome.Report, StringComparison.Ordinal);
            Assert.Contains("defect", outcome.Report, StringComparison.Ordinal);
        }
    }

    [Fact]
    public async Task AResetThatCannotLoadTheGuestEndsTheVm()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            vm.Start();
            board.OnReset = () => throw new InvalidOperationException("the kernel file is gone");
            vm.Reset();
            VmOutcome outcome = await vm.Outcome.WaitAsync(Patience, Token);
            Assert.Equal(VmEnd.Failure, outcome.End);
            Assert.Contains("the kernel file is gone", outcome.Report, StringComparison.Ordinal);
        }
    }

    [Fact]
    public async Task AFirstLoadThatFailsIsThrown()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            board.OnReset = () => throw new InvalidOperationException("no kernel");
            Assert.Throws<InvalidOperationException>(() => vm.Start());
            Assert.Equal(VmState.Created, vm.State);
        }
        Assert.True(board.Disposed);
        Assert.Equal(VmEnd.Stopped, (await vm.Outcome.WaitAsync(Patience, Token)).End);
    }

    [Fact]
    public async Task AStopBeforeTheStartKeepsTheVmFromRunning()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            vm.Stop();
            vm.Start();
            Assert.Equal(VmEnd.Stopped, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            Assert.Equal((VmState.Finished, 0, false), (vm.State, board.Resets, board[0].Running));
        }
        Assert.True(board.Disposed);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task AStopWhileTheGuestIsLoadedKeepsTheVmFromRunning(bool paused)
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        board.OnReset = () =>
        {
            vm.Stop();
            // The board is at work: the VM has not ended while it is.
            Assert.False(vm.Outcome.IsCompleted);
        };
        using (vm)
        {
            vm.Start(paused);
            Assert.Equal(VmEnd.Stopped, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            Assert.Equal((VmState.Finished, 1, false), (vm.State, board.Resets, board[0].Running));
        }
        Assert.True(board.Disposed);
    }

    [Fact]
    public async Task AVmStartsOnce()
    {
        (VirtualMachine vm, ScriptedBoard _) = Make();
        using (vm)
        {
            vm.Start();
            Assert.Throws<InvalidOperationException>(() => vm.Start());
            vm.Stop();
            Assert.Equal(VmEnd.Stopped, (await vm.Outcome.WaitAsync(Patience, Token)).End);
            vm.Start();
            Assert.Equal(VmState.Finished, vm.State);
        }
    }

    [Fact]
    public async Task StopEndsAVmThatStandsPaused()
    {
        (VirtualMachine vm, ScriptedBoard _) = Make();
        using (vm)
        {
            vm.Start(paused: true);
            vm.Stop();
            Assert.Equal(VmEnd.Stopped, (await vm.Outcome.WaitAsync(Patience, Token)).End);
        }
    }

    [Fact]
    public async Task ThePowerButtonReachesTheBoardOnlyWhileThereIsAGuest()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make();
        using (vm)
        {
            Assert.False(vm.PressPowerButton());
            Assert.Equal(0, board.ButtonPresses);
            vm.Start();
            Assert.True(vm.PressPowerButton());
            Assert.Equal(1, board.ButtonPresses);
            board.ButtonHeard = false;
            Assert.False(vm.PressPowerButton());
            Assert.Equal(2, board.ButtonPresses);
            vm.Stop();
            await vm.Outcome.WaitAsync(Patience, Token);
            Assert.False(vm.PressPowerButton());
            Assert.Equal(2, board.ButtonPresses);
            vm.Pause();
            vm.Reset();
            vm.Resume();
            Assert.Equal(VmState.Finished, vm.State);
        }
    }

    [Fact]
    public async Task OrdersFromManyThreadsAllComeBackAndTheVmGoesOn()
    {
        (VirtualMachine vm, ScriptedBoard board) = Make(cpus: 4);
        using (vm)
        {
            vm.Start();
            using CancellationTokenSource over = new();
            Task[] vcpuWork = new Task[4];
            for (int cpu = 0; cpu < 4; cpu++)
            {
                ScriptedVcpu vcpu = board[cpu];
                vcpuWork[cpu] = Task.Run(async () =>
                {
                    while (!over.IsCancellationRequested)
                    {
                        using SemaphoreSlim done = new(0);
                        vcpu.Execute(() =>
                        {
                            if (vcpu.InstructionsRetired % 7 == 0)
                                board.Power.Reset();
                            done.Release();
                        });
                        await done.WaitAsync(Patience, Token);
                    }
                }, Token);
            }
            Task[] control = new Task[4];
            for (int i = 0; i < control.Length; i++)
            {
                int seed = i;
                control[i] = Task.Run(() =>
                {
                    Random random = new(seed);
                    for (int n = 0; n < 200; n++)
                    {
                        switch (random.Next(3))
                        {
                            case 0:
                                vm.Pause();
                                break;
                            case 1:
                                vm.Reset();
                                break;
                            default:
                                vm.Resume();
                                break;
                        }
                    }
                }, Token);
            }
            await Task.WhenAll(control).WaitAsync(Patience, Token);
            vm.Resume();
            over.Cancel();
            await Task.WhenAll(vcpuWork).WaitAsync(Patience, Token);
            Assert.False(board.VcpuRanDuringReset);
            Assert.Equal(VmState.Running, vm.State);
            board[3].Execute(board.Power.PowerOff);
            Assert.Equal(VmEnd.PoweredOff, (await vm.Outcome.WaitAsync(Patience, Token)).End);
        }
    }

    private static (VirtualMachine Vm, ScriptedBoard Board) Make(int cpus = 1, bool noReboot = false)
    {
        ScriptedBoard? board = null;
        VirtualMachine vm = new(power => board = new ScriptedBoard(power, cpus), noReboot);
        return (vm, board!);
    }
}
