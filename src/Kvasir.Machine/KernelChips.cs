using System;
using System.Buffers.Binary;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>
/// The states of an 8259, an I/O APIC and a PIT as KVM gives and takes them (arch/x86/include/uapi/asm/kvm.h: struct kvm_pic_state, kvm_ioapic_state, kvm_pit_state2), and
/// as the board's own have them.
/// </summary>
internal static class KernelChips
{
    private const byte Icw1Fixed = 0x10;
    private const byte Icw1NeedsIcw4 = 1;
    private const byte Icw4Intel86 = 1;
    private const byte Icw4AutoEoi = 1 << 1;
    private const byte Icw4SpecialFullyNested = 1 << 4;
    private const ulong IoApicBase = 0xfec0_0000;

    /// <summary>Bytes of struct kvm_pit_channel_state.</summary>
    private const int PitChannelSize = 24;

    private static readonly byte[] s_triggerMasks = [0xf8, 0xde];

    // Offsets in struct kvm_pic_state
    private const int LastRequest = 0;
    private const int Request = 1;
    private const int Mask = 2;
    private const int InService = 3;
    private const int Highest = 4;
    private const int VectorBase = 5;
    private const int ReadInService = 6;
    private const int Poll = 7;
    private const int SpecialMask = 8;
    private const int InitState = 9;
    private const int AutoEoi = 10;
    private const int RotateOnAutoEoi = 11;
    private const int SpecialFullyNested = 12;
    private const int FourWords = 13;
    private const int Trigger = 14;
    private const int TriggerMask = 15;

    // Offsets in struct kvm_ioapic_state
    private const int BaseAddress = 0;
    private const int Select = 8;
    private const int Id = 12;
    private const int Levels = 16;
    private const int Table = 24;

    // Offsets in struct kvm_pit_channel_state
    private const int Count = 0;
    private const int LatchedCount = 4;
    private const int CountLatched = 6;
    private const int StatusLatched = 7;
    private const int Status = 8;
    private const int ReadState = 9;
    private const int WriteState = 10;
    private const int WriteLatch = 11;
    private const int Access = 12;
    private const int Mode = 13;
    private const int Bcd = 14;
    private const int Gate = 15;
    private const int LoadTime = 16;

    /// <summary>KVM counts the bytes of a count that is read or written low byte first from this on.</summary>
    private const byte LowOfTwo = 3;
    private const byte HighOfTwo = 4;

    /// <summary>Takes the state of all three out.</summary>
    /// <param name="kernel">KVM's.</param>
    /// <param name="clock">The board's counters count from its start.</param>
    /// <exception cref="Linux.LinuxException">KVM refused.</exception>
    public static WiredControllers Take(KvmInterrupts kernel, VmClock clock)
    {
        Span<byte> raw = stackalloc byte[KvmInterrupts.ChipSize];
        kernel.GetChip(KernelChip.MasterPic, raw);
        Pic8259.State pic = new() { Master = ReadPic(raw, icw3: 1 << 2) };
        kernel.GetChip(KernelChip.SlavePic, raw);
        pic.Slave = ReadPic(raw, icw3: 2);
        kernel.GetChip(KernelChip.IoApic, raw);
        IoApic.State ioApic = ReadIoApic(raw);
        Span<byte> timer = raw[..KvmInterrupts.PitSize];
        kernel.GetPit(timer);
        long hostNow = KvmInterrupts.PitNow;
        long now = (long)VmClock.ToTicks(clock.Now, Pit8254.Frequency);
        Pit8254.State pit = new()
        {
            Counter0 = ReadCounter(timer, now, hostNow),
            Counter1 = ReadCounter(timer[PitChannelSize..], now, hostNow),
            Counter2 = ReadCounter(timer[(2 * PitChannelSize)..], now, hostNow),
            Shown = now,
        };
        return new WiredControllers(pic, ioApic, pit);
    }

    /// <summary>Puts it in. Counters that repeat begin a new turn: KVM loads them when it is given them.</summary>
    /// <inheritdoc cref="Take"/>
    public static void Give(KvmInterrupts kernel, VmClock clock, WiredControllers state)
    {
        Span<byte> raw = stackalloc byte[KvmInterrupts.ChipSize];
        WritePic(raw, state.Pic.Master, s_triggerMasks[0]);
        kernel.SetChip(KernelChip.MasterPic, raw);
        WritePic(raw, state.Pic.Slave, s_triggerMasks[1]);
        kernel.SetChip(KernelChip.SlavePic, raw);
        WriteIoApic(raw, state.IoApic);
        kernel.SetChip(KernelChip.IoApic, raw);
        Span<byte> timer = raw[..KvmInterrupts.PitSize];
        kernel.GetPit(timer);
        long now = (long)VmClock.ToTicks(clock.Now, Pit8254.Frequency);
        WriteCounter(timer, state.Pit.Counter0, now);
        WriteCounter(timer[PitChannelSize..], state.Pit.Counter1, now);
        WriteCounter(timer[(2 * PitChannelSize)..], state.Pit.Counter2, now);
        kernel.SetPit(timer);
    }

    private static Pic8259.ChipState ReadPic(ReadOnlySpan<byte> raw, byte icw3) => new()
    {
        Request = raw[Request],
        InService = raw[InService],
        Mask = raw[Mask],
        Trigger = raw[Trigger],
        Lines = raw[LastRequest],
        VectorBase = raw[VectorBase],
        Lowest = (byte)((raw[Highest] + 7) & 7),
        NextWord = raw[InitState] == 0 ? (byte)0 : (byte)(raw[InitState] + 1),
        Icw1 = (byte)(Icw1Fixed | (raw[FourWords] != 0 ? Icw1NeedsIcw4 : 0)),
        Icw3 = icw3,
        Icw4 = (byte)(Icw4Intel86 | (raw[AutoEoi] != 0 ? Icw4AutoEoi : 0) | (raw[SpecialFullyNested] != 0 ? Icw4SpecialFullyNested : 0)),
        RotateOnAutoEoi = raw[RotateOnAutoEoi] != 0,
        SpecialMask = raw[SpecialMask] != 0,
        ReadInService = raw[ReadInService] != 0,
        Poll = raw[Poll] != 0,
    };

    private static void WritePic(Span<byte> raw, in Pic8259.ChipState chip, byte triggerMask)
    {
        raw.Clear();
        // KVM knows no chip that was never initialized: a masked one keeps as quiet.
        bool quiet = chip.NextWord == 1;
        raw[LastRequest] = chip.Lines;
        raw[Request] = chip.Request;
        raw[Mask] = quiet ? (byte)0xff : chip.Mask;
        raw[InService] = chip.InService;
        raw[Highest] = (byte)((chip.Lowest + 1) & 7);
        raw[VectorBase] = chip.VectorBase;
        raw[ReadInService] = Flag(chip.ReadInService);
        raw[Poll] = Flag(chip.Poll);
        raw[SpecialMask] = Flag(chip.SpecialMask);
        raw[InitState] = chip.NextWord <= 1 ? (byte)0 : (byte)(chip.NextWord - 1);
        raw[AutoEoi] = Flag((chip.Icw4 & Icw4AutoEoi) != 0);
        raw[RotateOnAutoEoi] = Flag(chip.RotateOnAutoEoi);
        raw[SpecialFullyNested] = Flag((chip.Icw4 & Icw4SpecialFullyNested) != 0);
        raw[FourWords] = Flag((chip.Icw1 & Icw1NeedsIcw4) != 0);
        raw[Trigger] = chip.Trigger;
        raw[TriggerMask] = triggerMask;
    }

    private static IoApic.State ReadIoApic(ReadOnlySpan<byte> raw)
    {
        IoApic.State state = new()
        {
            Select = (byte)BinaryPrimitives.ReadUInt32LittleEndian(raw[Select..]),
            Id = (byte)BinaryPrimitives.ReadUInt32LittleEndian(raw[Id..]),
            Levels = BinaryPrimitives.ReadUInt32LittleEndian(raw[Levels..]),
        };
        for (int pin = 0; pin < IoApic.PinCount; pin++)
            state.Table[pin] = BinaryPrimitives.ReadUInt64LittleEndian(raw[(Table + pin * sizeof(ulong))..]);
        return state;
    }

    private static void WriteIoApic(Span<byte> raw, in IoApic.State state)
    {
        raw.Clear();
        BinaryPrimitives.WriteUInt64LittleEndian(raw[BaseAddress..], IoApicBase);
        BinaryPrimitives.WriteUInt32LittleEndian(raw[Select..], state.Select);
        BinaryPrimitives.WriteUInt32LittleEndian(raw[Id..], state.Id);
        BinaryPrimitives.WriteUInt32LittleEndian(raw[Levels..], state.Levels);
        for (int pin = 0; pin < IoApic.PinCount; pin++)
            BinaryPrimitives.WriteUInt64LittleEndian(raw[(Table + pin * sizeof(ulong))..], state.Table[pin]);
    }

    private static PitCounter ReadCounter(ReadOnlySpan<byte> raw, long now, long hostNow)
    {
        PitCounter counter = PitCounter.AtPowerOn(raw[Gate] != 0);
        counter.Mode = raw[Mode];
        counter.Access = raw[Access];
        counter.Bcd = raw[Bcd] != 0;
        counter.ReadHigh = raw[ReadState] == HighOfTwo;
        counter.WriteHigh = raw[WriteState] == HighOfTwo;
        counter.WriteLow = raw[WriteLatch];
        counter.Latch = BinaryPrimitives.ReadUInt16LittleEndian(raw[LatchedCount..]);
        counter.LatchBytes = raw[CountLatched] switch { 0 => 0, LowOfTwo => 2, _ => 1 };
        counter.StatusLatched = raw[StatusLatched] != 0;
        counter.Status = raw[Status];
        int count = (int)BinaryPrimitives.ReadUInt32LittleEndian(raw[Count..]);
        if (counter.Access == 0 || count <= 0)
            return counter;
        counter.Count = counter.NextCount = count;
        long elapsed = Math.Max(hostNow - BinaryPrimitives.ReadInt64LittleEndian(raw[LoadTime..]), 0);
        counter.Loaded = now - (long)VmClock.ToTicks(elapsed, Pit8254.Frequency);
        return counter;
    }

    private static void WriteCounter(Span<byte> raw, PitCounter counter, long now)
    {
        raw[..PitChannelSize].Clear();
        // What is left of a count that ends once; the others begin anew.
        long count = counter.NextCount;
        if (counter.Mode is 0 or 4 && counter.Loaded != PitCounter.Never)
            count = Math.Max(counter.Count - Math.Max(now - counter.Loaded, 0), 1);
        BinaryPrimitives.WriteUInt32LittleEndian(raw[Count..], (uint)count);
        BinaryPrimitives.WriteUInt16LittleEndian(raw[LatchedCount..], counter.Latch);
        raw[CountLatched] = counter.LatchBytes switch { 0 => 0, 2 => LowOfTwo, _ => counter.Access == 3 ? HighOfTwo : counter.Access };
        raw[StatusLatched] = Flag(counter.StatusLatched);
        raw[Status] = counter.Status;
        raw[ReadState] = counter.Access == 3 ? counter.ReadHigh ? HighOfTwo : LowOfTwo : counter.Access;
        raw[WriteState] = counter.Access == 3 ? counter.WriteHigh ? HighOfTwo : LowOfTwo : counter.Access;
        raw[WriteLatch] = counter.WriteLow;
        raw[Access] = counter.Access;
        raw[Mode] = counter.Mode;
        raw[Bcd] = Flag(counter.Bcd);
        raw[Gate] = Flag(counter.Gate);
    }

    private static byte Flag(bool value) => value ? (byte)1 : (byte)0;
}
