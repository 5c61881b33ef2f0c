using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Machine.Boards;
using Xunit;

namespace Kvasir.Machine.Tests;

public sealed class BoardFrameTests
{
    /// <summary>A device, or something that devices work with.</summary>
    private sealed class Part(string name, List<string> log) : IPausable, IDisposable
    {
        public void Pause() => log.Add($"{name} stands");

        public void Resume() => log.Add($"{name} goes on");

        public void Dispose() => log.Add($"{name} is freed");
    }

    /// <summary>A disk that came after its controller is freed before it: the controller must not work on it any more.</summary>
    [Fact]
    public void DevicesStandBeforeTheFirstPartIsFreed()
    {
        List<string> log = [];
        BoardFrame board = new(new VmConfiguration { Name = "test", Memory = VmConfiguration.MinimumMemory }, 1_000_000_000);
        Part controller = board.Own(new Part("controller", log));
        board.AddPausable(controller);
        board.Own(new Part("disk", log));
        board.Dispose();
        Assert.Equal(["controller stands", "disk is freed", "controller is freed"], log);
    }
}
