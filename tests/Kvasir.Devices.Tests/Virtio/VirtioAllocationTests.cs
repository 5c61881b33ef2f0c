using System;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>Alone in the process: what it counts is the process's.</summary>
[CollectionDefinition("alone", DisableParallelization = true)]
public sealed class AloneCollection;

[Collection("alone")]
public sealed class VirtioAllocationTests
{
    private const ulong Rings = 0x10_0000;
    private const ulong Headers = 0x90_0000;
    private const ulong Data = 0xa0_0000;
    private const ulong All = ulong.MaxValue & ~ModelDriver.RingPacked;

    [Fact]
    public async Task ARequestAllocatesNothing()
    {
        using GuestMemory memory = new(32ul << 20);
        string path = Path.Combine(Path.GetTempPath(), $"kvasir-alloc-{Guid.NewGuid():N}");
        await File.WriteAllBytesAsync(path, new byte[1 << 20], TestContext.Current.CancellationToken);
        await using BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "raw" }, TestContext.Current.CancellationToken);
        File.Delete(path);
        using VirtioBlk device = new("blk", memory, new Disk(backend, new DiskSettings { Name = "d" }));
        ModelDriver driver = new(device, memory);
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        void Round()
        {
            for (int i = 0; i < 16; i++)
            {
                ulong header = Headers + (ulong)i * 32;
                queue.TryAdd([new Part(header, 16, false), new Part(Data, 4096, i % 2 == 0), new Part(header + 16, 1, true)], indirect: true);
            }
            driver.Kick(0);
            for (int taken = 0; taken < 16;)
            {
                if (queue.TryTake(out _, out _))
                    taken++;
                else
                    Thread.Yield();
            }
        }

        for (int i = 0; i < 16; i++)
        {
            memory.TryWrite(new Gpa(Headers + (ulong)i * 32), i % 2 == 0 ? 0u : 1u);
            memory.TryWrite(new Gpa(Headers + (ulong)i * 32 + 8), (ulong)i * 8);
        }
        for (int warm = 0; warm < 300; warm++)
            Round();
        long before = GC.GetTotalAllocatedBytes(precise: true);
        for (int i = 0; i < 300; i++)
            Round();
        long each = (GC.GetTotalAllocatedBytes(precise: true) - before) / (300 * 16);
        // The runtime's own threads allocate now and then; a request that allocates takes at least 24 bytes each time.
        Assert.InRange(each, 0, 8);
    }
}
