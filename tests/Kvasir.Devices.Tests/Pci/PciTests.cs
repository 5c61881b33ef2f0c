using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Devices.Pci;
using Xunit;

namespace Kvasir.Devices.Tests.Pci;

/// <summary>Configuration space, address decoding and interrupts of the Q35 root complex, as software sees them.</summary>
public sealed class PciTests
{
    private sealed class Sink : IMsiSink
    {
        public List<(ulong Address, uint Data)> Sent { get; } = [];

        public void Send(ulong address, uint data) => Sent.Add((address, data));
    }

    /// <summary>Answers with its offset, and remembers the last write.</summary>
    private sealed class Region : IMmioDevice, IPortDevice
    {
        public (ulong Offset, ulong Value) Last { get; private set; }

        public ulong Read(ulong offset, AccessSize size) => 0x1111_0000 | offset;

        public void Write(ulong offset, AccessSize size, ulong value) => Last = (offset, value);

        public uint ReadPort(ushort port, AccessSize size) => 0x2222_0000u | port;

        public void WritePort(ushort port, AccessSize size, uint value) => Last = (port, value);
    }

    private const ulong Ecam = 0xb000_0000;

    private readonly Sink _sink = new();
    private readonly PortBus _ports = new();
    private readonly MmioBus _mmio = new();
    private readonly Q35HostBridge _host;
    private readonly Dictionary<(int, int), bool> _pins = [];

    public PciTests()
    {
        _host = new Q35HostBridge(_sink, (device, pin, asserted) => _pins[(device, pin)] = asserted, memoryStart: 0x2000_0000);
        _host.Map(_ports, _mmio, 0xfec0_0000, 1ul << 32, 64ul << 30);
        _host.EnableEcam(Ecam);
    }

    private static ulong At(int bus, int device, int function, int register) => Ecam + ((ulong)bus << 20 | (ulong)device << 15 | (ulong)function << 12 | (uint)register);

    private uint Read(int device, int register, AccessSize size = AccessSize.Dword, int bus = 0) => (uint)_mmio.Read(new Gpa(At(bus, device, 0, register)), size);

    private void Write(int device, int register, uint value, AccessSize size = AccessSize.Dword, int bus = 0) => _mmio.Write(new Gpa(At(bus, device, 0, register)), size, value);

    private uint ReadByPorts(int device, int register)
    {
        _ports.Write(0xcf8, AccessSize.Dword, 0x8000_0000u | (uint)device << 11 | (uint)register & 0xfc);
        return _ports.Read(0xcfc, AccessSize.Dword);
    }

    private (PciFunction Function, Region Region) Plug(int slot, int msixVectors = 0, bool msi = false)
    {
        PciFunction function = new($"device{slot}", new PciIdentity(0x1234, (ushort)(0x5600 + slot), PciClass.OtherStorage));
        Region region = new();
        function.UsePin(1);
        if (msixVectors > 0)
            function.AddMsix(1, msixVectors);
        if (msi)
            function.AddMsi(4);
        function.AddMemoryBar(2, PciBarKind.Memory32, 0x2000, region);
        function.AddPortBar(3, 64, region);
        function.AddMemoryBar(4, PciBarKind.Prefetchable64, 0x10_0000, region);
        _host.RootBus.Plug(function, new PciSlot(slot));
        return (function, region);
    }

    [Fact]
    public void BothWaysIntoConfigurationSpaceShowTheSame()
    {
        Plug(3);
        Assert.Equal(0x29c0_8086u, Read(0, 0));
        Assert.Equal(0x5603_1234u, Read(3, 0));
        Assert.Equal(0x5603_1234u, ReadByPorts(3, 0));
        Assert.Equal(0xffff_ffffu, Read(9, 0));
        Assert.Equal(0xffff_ffffu, ReadByPorts(9, 0));
        Assert.Equal(0x5603u, Read(3, 2, AccessSize.Word));
        Assert.Equal(0x56u, Read(3, 3, AccessSize.Byte));
        _ports.Write(0xcf8, AccessSize.Dword, 0x8000_0000u | 3 << 11);
        Assert.Equal(0x5603u, _ports.Read(0xcfe, AccessSize.Word));
        // Not a double word: not the address register.
        _ports.Write(0xcf8, AccessSize.Byte, 0);
        Assert.Equal(0x8000_1800u, _ports.Read(0xcf8, AccessSize.Dword));
        _ports.Write(0xcf8, AccessSize.Dword, 3 << 11);
        Assert.Equal(0xffff_ffffu, _ports.Read(0xcfc, AccessSize.Dword));
    }

    [Fact]
    public void EcamMovesAndGoesWithItsRegister()
    {
        Write(0, 0x60, 0);
        Assert.Equal(0xffff_ffffu, Read(0, 0));
        _ports.Write(0xcf8, AccessSize.Dword, 0x8000_0060u);
        _ports.Write(0xcfc, AccessSize.Dword, 0xd000_0001u | 2 << 1);
        Assert.Equal(0x29c0_8086u, (uint)_mmio.Read(new Gpa(0xd000_0000), AccessSize.Dword));
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xd400_0000), AccessSize.Dword));
        _host.Reset();
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xd000_0000), AccessSize.Dword));
    }

    [Fact]
    public void OnlyWhatCanBeWrittenChanges()
    {
        Plug(3);
        Write(3, 0, 0xffff_ffff);
        Write(3, 8, 0xffff_ffff);
        Assert.Equal(0x5603_1234u, Read(3, 0));
        Assert.Equal(0x0180_0000u, Read(3, 8));
        Write(3, 4, 0xffff_ffff);
        Assert.Equal((uint)PciCommand.Writable, Read(3, 4, AccessSize.Word));
        Write(3, 0x3c, 0xffff_ff0b);
        Assert.Equal(0x0000_010bu, Read(3, 0x3c));
    }

    [Fact]
    public void RegionsAreSizedMovedAndSwitched()
    {
        (_, Region region) = Plug(3);
        Write(3, 0x18, 0xffff_ffff);
        Write(3, 0x1c, 0xffff_ffff);
        Write(3, 0x20, 0xffff_ffff);
        Write(3, 0x24, 0xffff_ffff);
        Assert.Equal(0xffff_e000u, Read(3, 0x18));
        Assert.Equal(0xffff_ffc1u, Read(3, 0x1c));
        Assert.Equal(0xfff0_000cu, Read(3, 0x20));
        Assert.Equal(0xffff_ffffu, Read(3, 0x24));

        Write(3, 0x18, 0xc010_0000);
        Write(3, 0x1c, 0xd000);
        Write(3, 0x20, 0);
        Write(3, 0x24, 2);
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc010_0004), AccessSize.Dword));
        Write(3, 4, 3, AccessSize.Word);
        Assert.Equal(0x1111_0004u, (uint)_mmio.Read(new Gpa(0xc010_0004), AccessSize.Dword));
        Assert.Equal(0x1111_0008u, (uint)_mmio.Read(new Gpa(0x2_0000_0008), AccessSize.Dword));
        Assert.Equal(0x2222_0010u, _ports.Read(0xd010, AccessSize.Dword));
        _mmio.Write(new Gpa(0xc010_1ffc), AccessSize.Dword, 7);
        Assert.Equal((0x1ffcul, 7ul), region.Last);
        // Eight bytes at once come as two fours, the lower one first.
        _mmio.Write(new Gpa(0xc010_0010), AccessSize.Qword, 0x0000_0002_0000_0001);
        Assert.Equal((0x14ul, 2ul), region.Last);

        Write(3, 0x18, 0xc020_0000);
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc010_0004), AccessSize.Dword));
        Assert.Equal(0x1111_0004u, (uint)_mmio.Read(new Gpa(0xc020_0004), AccessSize.Dword));
        Write(3, 4, 1, AccessSize.Word);
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc020_0004), AccessSize.Dword));
        Assert.Equal(0x2222_0010u, _ports.Read(0xd010, AccessSize.Dword));
    }

    [Fact]
    public void AResizableRegionTakesTheSizeThatIsChosen()
    {
        PciFunction function = new("large", new PciIdentity(0x1234, 9, PciClass.OtherDisplay));
        Region region = new();
        PcieCapability.AddEndpoint(function);
        function.AddMemoryBar(0, PciBarKind.Prefetchable64, 1 << 20, region);
        function.MakeResizable(0, 0b1011);
        _host.RootBus.Plug(function, new PciSlot(6));
        Assert.Equal(0x0001_0015u, Read(6, 0x100));
        Assert.Equal(0b1011u << 4, Read(6, 0x104));
        Assert.Equal(0x20u, Read(6, 0x108));
        // 4 MiB is none of its sizes; 8 MiB is.
        Write(6, 0x108, 2 << 8);
        Assert.Equal(0x20u, Read(6, 0x108));
        Write(6, 0x108, 3 << 8);
        Assert.Equal(0x320u, Read(6, 0x108));
        Write(6, 0x10, 0xffff_ffff);
        Assert.Equal(0xff80_000cu, Read(6, 0x10));
        Write(6, 0x10, 0xc080_0000);
        Write(6, 0x14, 0);
        Write(6, 4, 2, AccessSize.Word);
        Assert.Equal(0x1111_0000u | 0x7f_0000u, (uint)_mmio.Read(new Gpa(0xc0ff_0000), AccessSize.Dword));
        function.Reset();
        Write(6, 0x10, 0xffff_ffff);
        Assert.Equal(0xfff0_000cu, Read(6, 0x10));
    }

    [Fact]
    public void WhereRegionsOverlapTheLowerSlotAnswers()
    {
        (_, Region first) = Plug(3);
        (_, Region second) = Plug(4);
        foreach (int slot in new[] { 4, 3 })
        {
            Write(slot, 0x18, 0xc010_0000);
            Write(slot, 4, 2, AccessSize.Word);
        }
        _mmio.Write(new Gpa(0xc010_0000), AccessSize.Dword, 5);
        Assert.Equal(5ul, first.Last.Value);
        Assert.Equal(0ul, second.Last.Value);
        Write(3, 0x18, 0xc030_0000);
        _mmio.Write(new Gpa(0xc010_0000), AccessSize.Dword, 6);
        Assert.Equal(6ul, second.Last.Value);
    }

    [Fact]
    public void CapabilitiesFormAList()
    {
        Plug(3, msixVectors: 3, msi: true);
        Assert.NotEqual(0u, Read(3, 6, AccessSize.Word) & 0x10);
        List<uint> ids = [];
        for (uint at = Read(3, 0x34, AccessSize.Byte); at != 0; at = Read(3, (int)at + 1, AccessSize.Byte))
            ids.Add(Read(3, (int)at, AccessSize.Byte));
        Assert.Equal([0x11u, 0x05u], ids);
    }

    [Fact]
    public void MsixMasksAndKeepsPendingInterrupts()
    {
        (PciFunction function, _) = Plug(3, msixVectors: 3);
        Msix msix = function.Msix!;
        Write(3, 0x14, 0xc000_0000);
        Write(3, 4, 6, AccessSize.Word);
        ulong table = 0xc000_0000;
        for (uint vector = 0; vector < 3; vector++)
        {
            Assert.Equal(1u, (uint)_mmio.Read(new Gpa(table + vector * 16 + 12), AccessSize.Dword));
            _mmio.Write(new Gpa(table + vector * 16), AccessSize.Qword, 0xfee0_1000);
            _mmio.Write(new Gpa(table + vector * 16 + 8), AccessSize.Dword, 0x40 + vector);
        }
        msix.Send(1);
        Assert.Empty(_sink.Sent);
        Assert.False(msix.IsPending(1));
        // On, with the whole function masked; vector 1 unmasked.
        Write(3, 0x40, 0xc000_0000);
        _mmio.Write(new Gpa(table + 16 + 12), AccessSize.Dword, 0);
        msix.Send(1);
        msix.Send(2);
        Assert.Empty(_sink.Sent);
        ulong pending = _mmio.Read(new Gpa(table + 2048), AccessSize.Qword);
        Assert.Equal(6ul, pending);
        Write(3, 0x40, 0x8000_0000);
        Assert.Equal([(0xfee0_1000ul, 0x41u)], _sink.Sent);
        Assert.Equal(4ul, _mmio.Read(new Gpa(table + 2048), AccessSize.Qword));
        _mmio.Write(new Gpa(table + 2 * 16 + 12), AccessSize.Dword, 0);
        Assert.Equal((0xfee0_1000ul, 0x42u), _sink.Sent[1]);
        msix.Send(1);
        Assert.Equal(3, _sink.Sent.Count);
        msix.Send(77);
        // Not a bus master: not a message.
        Write(3, 4, 2, AccessSize.Word);
        msix.Send(1);
        Assert.Equal(3, _sink.Sent.Count);
        Assert.Equal(0x8000u, Read(3, 0x42, AccessSize.Word) & 0xf800);
        Assert.Equal(2u, Read(3, 0x42, AccessSize.Word) & 0x7ff);
    }

    [Fact]
    public void MsiMasksAndKeepsPendingInterrupts()
    {
        (PciFunction function, _) = Plug(3, msi: true);
        int at = (int)Read(3, 0x34, AccessSize.Byte);
        Write(3, 4, 4, AccessSize.Word);
        Write(3, at + 4, 0xfee0_2000);
        Write(3, at + 12, 0x50, AccessSize.Word);
        function.Msi!.Send(0);
        Assert.Empty(_sink.Sent);
        Write(3, at + 2, 0x0021, AccessSize.Word);
        function.Msi.Send(3);
        Assert.Equal([(0xfee0_2000ul, 0x53u)], _sink.Sent);
        Write(3, at + 16, 8);
        function.Msi.Send(3);
        Assert.Single(_sink.Sent);
        Assert.Equal(8u, Read(3, at + 20));
        Write(3, at + 16, 0);
        Assert.Equal(2, _sink.Sent.Count);
        Assert.Equal(0u, Read(3, at + 20));
        // Fewer vectors than messages: they fold.
        Write(3, at + 2, 0x0001, AccessSize.Word);
        function.Msi.Send(3);
        Assert.Equal((0xfee0_2000ul, 0x50u), _sink.Sent[2]);
    }

    [Fact]
    public void ThePinFollowsTheDeviceUnlessItIsDisabled()
    {
        (PciFunction function, _) = Plug(3);
        function.SetIntx(true);
        Assert.True(_pins[(3, 0)]);
        Assert.NotEqual(0u, Read(3, 6, AccessSize.Word) & 8);
        Write(3, 4, 0x400, AccessSize.Word);
        Assert.False(_pins[(3, 0)]);
        Assert.NotEqual(0u, Read(3, 6, AccessSize.Word) & 8);
        Write(3, 4, 0, AccessSize.Word);
        Assert.True(_pins[(3, 0)]);
        function.SetIntx(false);
        Assert.False(_pins[(3, 0)]);
    }

    [Fact]
    public void PirqsReachTheIoApicAndWhereTheirRegistersSend()
    {
        ProbeLine[] apic = new ProbeLine[8];
        ProbeLine[] pic = new ProbeLine[16];
        for (int i = 0; i < 16; i++)
            pic[i] = new ProbeLine();
        for (int i = 0; i < 8; i++)
            apic[i] = new ProbeLine();
        Ich9Lpc lpc = new(apic, pic, 0x600);
        _host.RootBus.Plug(lpc, new PciSlot(31));
        lpc.SetPirq(2, true);
        lpc.SetPirq(2, true);
        Assert.True(apic[2].Level);
        Assert.All(pic, line => Assert.False(line.Level));
        Write(31, 0x62, 0x0b, AccessSize.Byte);
        Assert.True(pic[11].Level);
        Write(31, 0x62, 0x0a, AccessSize.Byte);
        Assert.False(pic[11].Level);
        Assert.True(pic[10].Level);
        lpc.SetPirq(2, false);
        Assert.True(pic[10].Level);
        lpc.SetPirq(2, false);
        Assert.False(pic[10].Level);
        Assert.False(apic[2].Level);
        lpc.SetPirq(5, true);
        Write(31, 0x69, 0x05, AccessSize.Byte);
        Assert.True(pic[5].Level);
        Write(31, 0x69, 0x80, AccessSize.Byte);
        Assert.False(pic[5].Level);
        Assert.Equal(0x601u, Read(31, 0x40));
    }

    [Fact]
    public void ABridgeLetsThroughWhatItsWindowsSay()
    {
        PciBridge bridge = new("bridge", new PciIdentity(0x1234, 1, 0), _sink);
        _host.RootBus.Plug(bridge, new PciSlot(5));
        PciFunction function = new("behind", new PciIdentity(0x1234, 2, PciClass.OtherStorage));
        Region region = new();
        function.AddMemoryBar(0, PciBarKind.Memory32, 0x1000, region);
        function.UsePin(2);
        bridge.Secondary.Plug(function, new PciSlot(3));
        Assert.Equal(0xffff_ffffu, Read(3, 0, bus: 1));
        Write(5, 0x18, 0x0001_0100);
        Assert.Equal(0x0002_1234u, Read(3, 0, bus: 1));
        Write(3, 0x10, 0xc050_0000, bus: 1);
        Write(3, 4, 2, AccessSize.Word, bus: 1);
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc050_0000), AccessSize.Dword));
        Write(5, 0x20, 0xc050_c050);
        Write(5, 4, 2, AccessSize.Word);
        Assert.Equal(0x1111_0000u, (uint)_mmio.Read(new Gpa(0xc050_0000), AccessSize.Dword));
        Write(5, 0x20, 0xc040_c040);
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc050_0000), AccessSize.Dword));
        // Pin B of device 3 is pin A of the bridge.
        function.SetIntx(true);
        Assert.True(_pins[(5, 0)]);
        // A secondary bus reset takes the device back to its start.
        Write(5, 0x3e, 0x40, AccessSize.Word);
        Assert.False(_pins[(5, 0)]);
        Assert.Equal(0u, Read(3, 4, AccessSize.Word, bus: 1));
    }

    [Fact]
    public void ASlotTellsOfWhatComesAndGoes()
    {
        PcieRootPort port = new("port", 1, _sink);
        _host.RootBus.Plug(port, new PciSlot(0x1c));
        int express = 0;
        for (int at = (int)Read(0x1c, 0x34, AccessSize.Byte); at != 0; at = (int)Read(0x1c, at + 1, AccessSize.Byte))
        {
            uint id = Read(0x1c, at, AccessSize.Byte);
            if (id == 0x10)
                express = at;
            if (id == 0x05)
            {
                Write(0x1c, at + 4, 0xfee0_0000);
                Write(0x1c, at + 12, 0x30, AccessSize.Word);
                Write(0x1c, at + 2, 1, AccessSize.Word);
            }
        }
        Write(0x1c, 4, 6, AccessSize.Word);
        Write(0x1c, 0x18, 0x0001_0100);
        // Presence, link and button, by interrupt.
        Write(0x1c, express + 0x18, 0x1029, AccessSize.Word);
        Assert.Equal(0u, Read(0x1c, express + 0x1a, AccessSize.Word));

        List<PciFunction> gone = [];
        port.Ejected += gone.Add;
        PciFunction device = new("disk", new PciIdentity(0x1234, 7, PciClass.OtherStorage));
        port.Insert(device);
        Assert.Equal([(0xfee0_0000ul, 0x30u)], _sink.Sent);
        Assert.Equal(0x0148u, Read(0x1c, express + 0x1a, AccessSize.Word));
        Assert.Equal(0x2000u, Read(0x1c, express + 0x12, AccessSize.Word) & 0x2000);
        Assert.Equal(0x0007_1234u, Read(0, 0, bus: 1));
        Write(0x1c, express + 0x1a, 0x0108, AccessSize.Word);
        Assert.Equal(0x0040u, Read(0x1c, express + 0x1a, AccessSize.Word));
        Assert.Throws<ArgumentException>(() => port.Insert(device));

        port.RequestRemoval();
        Assert.Equal(2, _sink.Sent.Count);
        Assert.Equal(0x0041u, Read(0x1c, express + 0x1a, AccessSize.Word));
        Write(0x1c, express + 0x1a, 0x0001, AccessSize.Word);
        Assert.Empty(gone);
        // The guest unloads the driver, and switches the power indicator off when it is done.
        Write(0x1c, express + 0x18, 0x1229, AccessSize.Word);
        Assert.Empty(gone);
        Write(0x1c, express + 0x18, 0x1329, AccessSize.Word);
        Assert.Equal([device], gone);
        Assert.Equal(0xffff_ffffu, Read(0, 0, bus: 1));
        Assert.Equal(0x0108u, Read(0x1c, express + 0x1a, AccessSize.Word));
        Assert.Equal(0u, Read(0x1c, express + 0x12, AccessSize.Word) & 0x2000);
    }

    [Fact]
    public void StateIsSavedAndRestored()
    {
        (PciFunction function, _) = Plug(3, msixVectors: 2);
        Write(3, 0x18, 0xc010_0000);
        Write(3, 4, 2, AccessSize.Word);
        PciFunction.State saved = function.Save();
        function.Reset();
        Assert.Equal(0xffff_ffffu, (uint)_mmio.Read(new Gpa(0xc010_0000), AccessSize.Dword));
        function.Restore(saved);
        Assert.Equal(0x1111_0000u, (uint)_mmio.Read(new Gpa(0xc010_0000), AccessSize.Dword));
    }

    /// <summary>A state that was cut or is another function's is refused whole.</summary>
    [Fact]
    public void AStateThatDoesNotFitChangesNothing()
    {
        (PciFunction function, _) = Plug(3, msixVectors: 2);
        Write(3, 0x18, 0xc010_0000);
        Write(3, 4, 2, AccessSize.Word);
        PciFunction.State saved = function.Save();
        Write(3, 4, 0, AccessSize.Word);
        PciFunction.State now = function.Save();
        byte[] Changed(int offset)
        {
            byte[] config = [.. saved.Config];
            config[offset] ^= 0x40;
            return config;
        }

        PciFunction.State[] bad =
        [
            default, saved with { Config = saved.Config[..256] }, saved with { Config = [.. saved.Config, 0] }, saved with { MsixTable = saved.MsixTable[1..] }, saved with { MsixTable = null! },
            saved with { MsixTable = [.. saved.MsixTable, 0] }, saved with { Config = Changed(2) }, saved with { Config = Changed(0x0b) }, saved with { Config = Changed(0x0e) },
        ];
        foreach (PciFunction.State state in bad)
        {
            Assert.Throws<StateException>(() => function.Restore(state));
            Assert.Equal(now.Config, function.Save().Config);
            Assert.Equal(now.MsixTable, function.Save().MsixTable);
        }
        function.Restore(saved);
        Assert.Equal(saved.Config, function.Save().Config);
    }

    [Fact]
    public void AnyWriteAnywhereHarmsNothing()
    {
        Plug(3, msixVectors: 2, msi: true);
        PcieRootPort port = new("port", 1, _sink);
        _host.RootBus.Plug(port, new PciSlot(0x1c));
        Random random = new(9);
        for (int i = 0; i < 50_000; i++)
        {
            int device = random.Next(4) switch { 0 => 0, 1 => 3, 2 => 0x1c, _ => random.Next(32) };
            AccessSize size = (AccessSize)(1 << random.Next(4));
            uint address = (uint)device << 11 | (uint)random.Next(256) & ~((uint)size - 1) | 0x8000_0000u;
            if (size == AccessSize.Qword)
                size = AccessSize.Dword;
            _ports.Write(0xcf8, AccessSize.Dword, address);
            _ports.Write((ushort)(0xcfc | address & 3), size, (uint)random.NextInt64());
            _ = _ports.Read((ushort)(0xcfc | address & 3), size);
            _ = _mmio.Read(new Gpa(0xc000_0000 + (ulong)random.Next(0x3ec0_0000)), (AccessSize)(1 << random.Next(4)));
        }
    }
}
