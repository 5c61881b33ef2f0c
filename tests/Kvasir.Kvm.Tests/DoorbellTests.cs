using System.Collections.Generic;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Privileged;
using Kvasir.Linux;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Kvm.Tests;

/// <summary>Writes that only say that there is work go past the vCPU's thread.</summary>
[Collection(Rig.OneAtATime)]
public class DoorbellTests
{
    private const uint Place = 0xd000_0000;
    private const uint Elsewhere = 0xd100_0000;

    [Fact]
    public void A_doorbell_rings_without_its_device()
    {
        Rig.RequireKvm();
        using Rig rig = new();
        if (rig.Doorbells is not { } taker)
        {
            Assert.Skip("this host's KVM has no event descriptors for writes");
            return;
        }
        using Region region = new();
        rig.Mmio.Connect(taker);
        rig.Mmio.Map(new Gpa(Place), 0x1000, region);
        Run(rig, Place);
        // One of any size and value, one of value 3 only: what does not match, and what is read, comes to the device.
        Assert.Equal((2, 1), (region.Any.Count(), region.Three.Count()));
        Assert.Equal([(0x14ul, 4ul), (0x20ul, 5ul)], region.Writes);
        Assert.Equal(1, region.Reads);

        region.Writes.Clear();
        Assert.True(rig.Mmio.Unmap(new Gpa(Place)));
        rig.Mmio.Map(new Gpa(Elsewhere), 0x1000, region);
        Run(rig, Place);
        Assert.Equal((0, 0, 0), (region.Any.Count(), region.Three.Count(), region.Writes.Count));
        Run(rig, Elsewhere);
        Assert.Equal((2, 1, 2), (region.Any.Count(), region.Three.Count(), region.Writes.Count));
    }

    private static void Run(Rig rig, uint place)
    {
        SystemBuilder b = SystemBuilder.Protected();
        b.Assemble(SystemBuilder.Program, a =>
        {
            a.mov(ebx, place);
            a.mov(__word_ptr[ebx + 0x10], 1);
            a.mov(__dword_ptr[ebx + 0x10], 2);
            a.mov(__dword_ptr[ebx + 0x14], 3);
            a.mov(__dword_ptr[ebx + 0x14], 4);
            a.mov(__dword_ptr[ebx + 0x20], 5);
            a.mov(eax, __dword_ptr[ebx + 0x10]);
            SystemBuilder.Exit(a);
        });
        rig.Load(b.Build("doorbells"));
        Assert.Equal(SystemEnd.Exit, rig.Run());
    }

    private sealed class Region : IMmioDevice, IDoorbellRegion, System.IDisposable
    {
        public Bell Any { get; } = new();

        public Bell Three { get; } = new();

        public List<(ulong Offset, ulong Value)> Writes { get; } = [];

        public int Reads { get; private set; }

        public IReadOnlyList<Doorbell> Doorbells => [new Doorbell(0x10, 0, null, Any.Descriptor), new Doorbell(0x14, 4, 3, Three.Descriptor)];

        public ulong Read(ulong offset, AccessSize size)
        {
            Reads++;
            return 0;
        }

        public void Write(ulong offset, AccessSize size, ulong value) => Writes.Add((offset, value));

        public void Dispose()
        {
            Any.Dispose();
            Three.Dispose();
        }
    }

    private sealed class Bell : System.IDisposable
    {
        public EventFd Descriptor { get; } = new();

        /// <summary>Signals since it was asked last.</summary>
        public int Count() => (int)Descriptor.Take();

        public void Dispose() => Descriptor.Dispose();
    }
}
