using System;
using System.Collections;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Kvasir.Network;
using Kvasir.Sharing;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>Saved states of all types of devices: those that fit, and those that were damaged.</summary>
public sealed class VirtioStateTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Data = 0x180_0000;
    private const ulong Split = ulong.MaxValue & ~ModelDriver.RingPacked;

    private readonly GuestMemory _memory = new(32ul << 20);

    public static TheoryData<string, bool> All
    {
        get
        {
            TheoryData<string, bool> all = [];
            foreach (string type in AnyDevice.Types)
            {
                all.Add(type, false);
                all.Add(type, true);
            }
            return all;
        }
    }

    public void Dispose() => _memory.Dispose();

    /// <summary>What waited in a ring when it was saved is answered by the other device, which has the same state before.</summary>
    [Theory]
    [MemberData(nameof(All))]
    public async Task AnyDeviceGoesOnInAnother(string type, bool packed)
    {
        await using AnyDevice first = await AnyDevice.OpenAsync(type, _memory);
        ModelDriver driver = new(first.Device, _memory);
        ModelQueue queue = driver.Start(packed ? ulong.MaxValue : Split, 16, Rings)[first.RequestQueue];
        for (int i = 0; i < 19; i++)
        {
            Add(queue);
            driver.Kick(queue.Index);
            first.Network.Peer?.Transmit(0);
            driver.Wait(queue);
        }
        first.Device.Pause();
        Add(queue);
        VirtioDevice.State saved = first.Device.Save();
        await using AnyDevice second = await AnyDevice.OpenAsync(type, _memory);
        ModelDriver other = new(second.Device, _memory);
        second.Device.Pause();
        second.Device.Restore(saved);
        Assert.Equal(Describe(saved with { Generation = 0 }), Describe(second.Device.Save() with { Generation = 0 }));
        second.Device.Resume();
        other.Wait(queue);
        Assert.Equal(15u, other.Status);
    }

    /// <summary>Each damage is found, and the device stays as it was and works.</summary>
    [Theory]
    [MemberData(nameof(All))]
    public async Task ADamagedStateIsRefusedAndChangesNothing(string type, bool packed)
    {
        await using AnyDevice any = await AnyDevice.OpenAsync(type, _memory);
        VirtioDevice device = any.Device;
        ModelDriver driver = new(device, _memory);
        ModelQueue queue = driver.Start(packed ? ulong.MaxValue : Split, 16, Rings)[any.RequestQueue];
        device.Pause();
        VirtioDevice.State good = device.Save();
        string before = Describe(good);
        foreach (VirtioDevice.State bad in Damages(good, queue.Index, packed))
        {
            StateException fault = Assert.Throws<StateException>(() => device.Restore(bad));
            Assert.StartsWith($"{type}: the saved state does not fit: ", fault.Message, StringComparison.Ordinal);
            Assert.Equal(before, Describe(device.Save()));
        }
        device.Restore(good);
        device.Resume();
        Add(queue);
        driver.Kick(queue.Index);
        any.Network.Peer?.Transmit(0);
        driver.Wait(queue);
    }

    /// <summary>States with anything in them are refused or harm nobody but their guest.</summary>
    [Theory]
    [MemberData(nameof(All))]
    public async Task AnyStateIsSurvived(string type, bool packed)
    {
        await using AnyDevice any = await AnyDevice.OpenAsync(type, _memory);
        VirtioDevice device = any.Device;
        ModelDriver driver = new(device, _memory);
        driver.Start(packed ? ulong.MaxValue : Split, 16, Rings);
        device.Pause();
        VirtioDevice.State good = device.Save();
        Random random = new(7);
        int refused = 0;
        for (int round = 0; round < 200; round++)
        {
            VirtqueueState[] queues = [.. good.Queues];
            ref VirtqueueState one = ref queues[random.Next(queues.Length)];
            one.NextAvailable = (ushort)random.Next(round % 2 == 0 ? 20 : 65536);
            one.NextUsed = (ushort)random.Next(round % 2 == 0 ? 20 : 65536);
            one.AvailableWrap = random.Next(2) == 0;
            if (round % 5 == 0)
                one.Device = (ulong)random.NextInt64(0, 40 << 20) & ~3ul;
            byte[] config = [.. good.Config];
            if (config.Length > 0)
                config[random.Next(config.Length)] = (byte)random.Next(256);
            HeldBuffer[] held = round % 3 > 0 ? [] : [new HeldBuffer(
                random.Next(queues.Length + 1), (ushort)random.Next(18), random.Next(18), random.Next(3), [((ulong)random.Next(1 << 25), random.Next(1, 100))], [((ulong)random.Next(1 << 26), random.Next(1, 5000))])];
            try
            {
                device.Restore(good with { Config = config, Queues = queues, Held = held, Status = (VirtioStatus)(random.Next(4) == 0 ? random.Next(256) : 15) });
            }
            catch (StateException)
            {
                refused++;
            }
            if (round % 2 == 0)
            {
                device.Resume();
                device.Pause();
            }
        }
        Assert.InRange(refused, 20, 190);
        device.Resume();
        ModelQueue queue = driver.Start(packed ? ulong.MaxValue : Split, 16, Rings)[any.RequestQueue];
        Add(queue);
        driver.Kick(queue.Index);
        any.Network.Peer?.Transmit(0);
        driver.Wait(queue);
        Assert.Equal(15u, driver.Status);
    }

    /// <summary>A device takes the state of another moment of its own: what it holds of now is forgotten, and answered to nobody.</summary>
    [Fact]
    public async Task AStateOfBeforeForgetsWhatIsHeldNow()
    {
        await using AnyDevice any = await AnyDevice.OpenAsync("balloon", _memory);
        VirtioBalloon device = (VirtioBalloon)any.Device;
        ModelDriver driver = new(device, _memory);
        ModelQueue statistics = driver.Start(Split, 16, Rings)[2];
        device.SetTarget(5 << 20);
        device.Pause();
        VirtioDevice.State before = device.Save();
        device.SetTarget(7 << 20);
        device.Resume();
        Add(statistics);
        driver.Kick(2);
        Assert.True(SpinWait.SpinUntil(() => device.Queues[2].Setup.NextAvailable == 1, 120_000));
        device.Pause();
        Assert.Single(device.Save().Held);
        device.Restore(before);
        Assert.Empty(device.Save().Held);
        VirtioBalloon.BalloonState model = new(9, 5, true, BalloonStatistics.Unknown with { Free = 3 });
        device.Restore(before with { Model = model });
        Assert.Equal(model, device.Save().Model);
        Assert.Equal(5u << 20 >> 12, driver[0x100]);
        Assert.Equal(before.Generation, device.ConfigGeneration);
        // It stays asked for after the driver's reset.
        driver.Status = 0;
        Assert.True(SpinWait.SpinUntil(() => driver.Status == 0, 120_000));
        Assert.Equal(5u << 20 >> 12, driver[0x100]);
        device.Resume();
    }

    [Fact]
    public async Task ADiskOfAnotherSizeIsToldToTheDriver()
    {
        await using AnyDevice any = await AnyDevice.OpenAsync("blk", _memory);
        ModelDriver driver = new(any.Device, _memory);
        driver.Start(Split, 16, Rings);
        any.Device.Pause();
        VirtioDevice.State saved = any.Device.Save();
        saved.Config[1] = 4;
        any.Device.Restore(saved);
        Assert.Equal(2048u, driver[0x100]);
        Assert.NotEqual(saved.Generation, any.Device.ConfigGeneration);
        Assert.Equal(0u, driver[0x60] & 2);
        any.Device.Resume();
        Assert.Equal(2u, driver[0x60] & 2);
    }

    /// <summary>A driver that broke the rules has to reset the restored device, too.</summary>
    [Fact]
    public async Task ADeviceThatWaitsForItsResetStillDoes()
    {
        await using AnyDevice any = await AnyDevice.OpenAsync("rng", _memory);
        ModelDriver driver = new(any.Device, _memory);
        ModelQueue queue = driver.Start(Split, 16, Rings)[0];
        any.Device.Fail("a test");
        any.Device.Pause();
        VirtioDevice.State saved = any.Device.Save();
        await using AnyDevice second = await AnyDevice.OpenAsync("rng", _memory);
        List<string> log = [];
        second.Device.Log = log.Add;
        ModelDriver other = new(second.Device, _memory);
        second.Device.Pause();
        second.Device.Restore(saved);
        second.Device.Resume();
        Add(queue);
        other.Kick(0);
        second.Device.Fail("again");
        Assert.Equal(15u | 64u, other.Status);
        Assert.Empty(log);
        Assert.False(queue.TryTake(out _, out _));
        queue = other.Start(Split, 16, Rings)[0];
        Add(queue);
        other.Kick(0);
        other.Wait(queue);
    }

    /// <summary>What the guest had open is open in another server over the same folder; what went meanwhile is stale, and so is a new file in its place.</summary>
    [Fact]
    public async Task AShareGoesOnInAnotherServer()
    {
        await using AnyDevice any = await AnyDevice.OpenAsync("fs", _memory);
        ModelDriver driver = new(any.Device, _memory);
        ModelQueue queue = driver.Start(Split, 16, Rings)[1];
        File.WriteAllText(Path.Combine(any.Folder, "kept"), "kept file");
        File.WriteAllText(Path.Combine(any.Folder, "gone"), "gone file");
        Fuse(driver, queue, 26, 0, [.. U32(7, 31, 65536, 0)]);
        (ulong kept, ulong keptHandle) = Open(driver, queue, "kept");
        (ulong gone, ulong goneHandle) = Open(driver, queue, "gone");
        any.Device.Pause();
        VirtioDevice.State saved = any.Device.Save();
        File.Delete(Path.Combine(any.Folder, "gone"));
        File.WriteAllText(Path.Combine(any.Folder, "gone"), "another's");
        using FuseServer server = new(any.Folder, readOnly: false);
        using VirtioFs second = new("second", _memory, server, "share");
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        second.Resume();
        Assert.Equal("kept file", Encoding.ASCII.GetString(Read(other, queue, kept, keptHandle, out int error)));
        Assert.Equal(0, error);
        Read(other, queue, gone, goneHandle, out error);
        Assert.Contains(error, new[] { 9, 116 });
        Fuse(other, queue, 3, gone, new byte[16], out error);
        Assert.Equal(116, error);
        // Its name leads to the new file, under a number of its own.
        (ulong renewed, ulong handle) = Open(other, queue, "gone");
        Assert.DoesNotContain(renewed, new[] { kept, gone });
        Assert.Equal("another's", Encoding.ASCII.GetString(Read(other, queue, renewed, handle, out _)));
    }

    private (ulong Node, ulong Handle) Open(ModelDriver driver, ModelQueue queue, string name)
    {
        ulong node = BitConverter.ToUInt64(Fuse(driver, queue, 1, 1, [.. Encoding.ASCII.GetBytes(name), 0]));
        return (node, BitConverter.ToUInt64(Fuse(driver, queue, 14, node, U32(2, 0))));
    }

    private byte[] Read(ModelDriver driver, ModelQueue queue, ulong node, ulong handle, out int error) =>
        Fuse(driver, queue, 15, node, [.. BitConverter.GetBytes(handle), .. new byte[8], .. U32(100, 0), .. new byte[16]], out error);

    private byte[] Fuse(ModelDriver driver, ModelQueue queue, uint operation, ulong node, byte[] arguments)
    {
        byte[] answer = Fuse(driver, queue, operation, node, arguments, out int error);
        Assert.Equal(0, error);
        return answer;
    }

    private byte[] Fuse(ModelDriver driver, ModelQueue queue, uint operation, ulong node, byte[] arguments, out int error)
    {
        byte[] message = [.. U32((uint)(40 + arguments.Length), operation), .. BitConverter.GetBytes(1ul), .. BitConverter.GetBytes(node), .. new byte[16], .. arguments];
        _memory.TryWrite(new Gpa(Data), message);
        Assert.True(queue.TryAdd([new Part(Data, (uint)message.Length, false), new Part(Data + 0x1000, 4096, true)], indirect: false) >= 0);
        driver.Kick(queue.Index);
        byte[] answer = new byte[driver.Wait(queue).Written];
        Assert.True(_memory.TryRead(new Gpa(Data + 0x1000), answer));
        error = -BitConverter.ToInt32(answer, 4);
        return answer[16..];
    }

    private static byte[] U32(params uint[] values) => [.. values.SelectMany(BitConverter.GetBytes)];

    /// <summary>A buffer that every type answers, though none finds sense in it: a byte to read, and room for little.</summary>
    private static void Add(ModelQueue queue) =>
        Assert.True(queue.TryAdd([new Part(Data, 100, false), new Part(Data + 0x1000, 200, true)], indirect: false) >= 0);

    private static IEnumerable<VirtioDevice.State> Damages(VirtioDevice.State good, int queue, bool packed)
    {
        VirtioDevice.State WithQueue(Func<VirtqueueState, VirtqueueState> change)
        {
            VirtqueueState[] queues = [.. good.Queues];
            queues[queue] = change(queues[queue]);
            return good with { Queues = queues };
        }

        VirtioDevice.State WithHeld(params HeldBuffer[] held) => good with { Held = held };

        (ulong, int)[] part = [(Data, 100)];
        yield return default;
        yield return good with { Config = null! };
        yield return good with { Queues = null! };
        yield return good with { Held = null! };
        yield return good with { Config = [.. good.Config, 0] };
        yield return good with { Queues = good.Queues[1..] };
        yield return good with { Queues = [.. good.Queues, default] };
        yield return good with { Status = (VirtioStatus)0x10 };
        yield return good with { Status = VirtioStatus.DriverOk };
        yield return good with { Accepted = good.Accepted | VirtioFeatures.RingReset };
        yield return good with { Accepted = (VirtioFeatures)(1ul << 63) | good.Accepted };
        yield return WithQueue(state => state with { Size = 0 });
        yield return WithQueue(state => state with { Size = 33_000 });
        yield return WithQueue(state => state with { Descriptors = 1ul << 40 });
        yield return WithQueue(state => state with { Device = state.Device + 1 });
        yield return WithQueue(state => state with { Driver = ulong.MaxValue - 3 });
        yield return WithQueue(state => state with { Enabled = false, NextUsed = 4 });
        if (packed)
            yield return WithQueue(state => state with { NextAvailable = 16 });
        if (packed)
            yield return WithQueue(state => state with { NextUsed = 60_000 });
        yield return WithHeld((HeldBuffer)null!);
        yield return WithHeld(new HeldBuffer(-1, 0, 1, 0, part, []));
        yield return WithHeld(new HeldBuffer(good.Queues.Length, 0, 1, 0, part, []));
        yield return WithHeld(new HeldBuffer(queue, 0, 1, 0, [(1ul << 40, 8)], []));
        yield return WithHeld(new HeldBuffer(queue, 0, 1, 0, [], [(Data, -1)]));
        yield return WithHeld(new HeldBuffer(queue, 0, 1, 101, part, []));
        yield return WithHeld(new HeldBuffer(queue, 0, 1, -1, part, []));
        yield return WithHeld(new HeldBuffer(queue, 0, 1, 0, null!, []));
        yield return WithHeld(packed ? new HeldBuffer(queue, 0, 17, 0, part, []) : new HeldBuffer(queue, 16, 0, 0, part, []));
        yield return WithHeld([.. Enumerable.Range(0, 17).Select(i => new HeldBuffer(queue, (ushort)(i & 15), 1, 0, part, []))]);
        yield return good with { Model = new Foreign() };
        if (good.Model is null)
            yield break;
        yield return good with { Model = null };
        foreach (VirtioDevice.ModelState model in Damages(good.Model))
            yield return good with { Model = model };
    }

    private static IEnumerable<VirtioDevice.ModelState> Damages(VirtioDevice.ModelState model) => model switch
    {
        VirtioNet.NetState net => [net with { ActivePairs = 0 }, net with { ActivePairs = 2 }, net with { Offloads = (NetworkOffloads)0x4000 }, net with { Filter = null! },
            net with { Filter = net.Filter with { Unicast = null! } }, net with { Filter = net.Filter with { Multicast = new ulong[65] } }, net with { Filter = net.Filter with { Vlans = new ulong[3] } }],
        VirtioScsi.ScsiState scsi => [scsi with { Units = [] }, scsi with { Units = [.. scsi.Units, .. scsi.Units] }, scsi with { Units = [.. scsi.Units, new(9, 0, 0, 0, 0)] },
            scsi with { Units = null! }, scsi with { Events = null! }, scsi with { Events = new VirtioScsi.EventState[65] }, scsi with { Events = [new(77, 0, 0)] }],
        VirtioConsole.ConsoleState console => [console with { Ports = console.Ports[1..] }, console with { Ports = [null!, null!] }, console with { Control = null! },
            console with { Ports = [console.Ports[0], console.Ports[1] with { Input = new byte[65537] }] }, console with { Ports = [console.Ports[0], console.Ports[1] with { Input = null! }] },
            console with { Control = [[1, 2, 3]] }, console with { Control = [null!] }, console with { Control = [[9, 0, 0, 0, 0, 0, 0, 0]] }, console with { Control = [new byte[5000]] },
            console with { Control = [.. Enumerable.Repeat(new byte[8], 257)] }],
        VirtioBalloon.BalloonState balloon => [balloon with { NextHint = 1 }],
        VirtioFs.FsState fs => [.. Damages(fs.Server).Select(server => new VirtioFs.FsState(server))],
        _ => throw new InvalidOperationException($"damages of {model} are not thought of"),
    };

    private static FuseServer.State[] Damages(FuseServer.State server) => [null!, server with { Nodes = null! }, server with { Handles = null! },
        server with { Nodes = [null!] }, server with { Handles = [new(1, 1, 0)], NextHandle = 2, Initialized = false }, server with { Initialized = true, Handles = [new(9, 1, 0)], NextHandle = 9 }];

    /// <summary>All of a state, arrays included.</summary>
    private static string Describe(object? value)
    {
        StringBuilder text = new();
        Append(text, value);
        return text.ToString();
    }

    private static void Append(StringBuilder text, object? value)
    {
        switch (value)
        {
            case null:
                text.Append("null ");
                break;
            case string or bool or Enum or IFormattable:
                text.Append(CultureInfo.InvariantCulture, $"{value} ");
                break;
            case IEnumerable items:
                text.Append('[');
                foreach (object? item in items)
                    Append(text, item);
                text.Append("] ");
                break;
            default:
                text.Append(CultureInfo.InvariantCulture, $"{value.GetType().Name}(");
                foreach (System.Reflection.FieldInfo field in value.GetType().GetFields(System.Reflection.BindingFlags.Instance | System.Reflection.BindingFlags.Public | System.Reflection.BindingFlags.NonPublic))
                    Append(text, field.GetValue(value));
                text.Append(") ");
                break;
        }
    }

    private sealed record Foreign : VirtioDevice.ModelState;
}
