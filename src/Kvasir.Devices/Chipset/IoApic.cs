using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// Intel 82093AA I/O APIC with the EOI register of version 20h (ICH9 datasheet, "I/O APIC"): 24 pins that send messages on the
/// <see cref="ApicBus"/>.
/// Pins carry logical levels (asserted or not): the polarity bit is kept but means nothing.
/// </summary>
/// <remarks>
/// Edges on a masked pin are lost, as the datasheet says; a level that is still there when its pin is unmasked is delivered.
/// </remarks>
public sealed class IoApic : IMmioDevice, IStateful<IoApic.State>, IResettable
{
    public const int PinCount = 24;

    /// <summary>Bytes of its region, at FEC00000h for the first one.</summary>
    public const ulong RegionSize = 0x1000;

    private enum Offset : ulong
    {
        Select = 0x00,
        Window = 0x10,
        Eoi = 0x40,
    }

    private enum Index : byte
    {
        Id = 0x00,
        Version = 0x01,
        Arbitration = 0x02,
        FirstRedirection = 0x10,
        LastRedirection = FirstRedirection + 2 * PinCount - 1,
    }

    /// <summary>One redirection table entry.</summary>
    private readonly record struct Entry(ulong Value)
    {
        public const ulong RemoteIrrBit = 1 << 14;

        /// <summary>Everything but delivery status and remote IRR; bits 55:49 extend the destination.</summary>
        public const ulong Writable = 0xfffe_0000_0001_afff;

        public byte Vector => (byte)Value;

        public DeliveryMode Mode => (DeliveryMode)(Value >> 8 & 7);

        public bool Logical => (Value & 1 << 11) != 0;

        public bool RemoteIrr => (Value & RemoteIrrBit) != 0;

        public bool LevelTriggered => (Value & 1 << 15) != 0;

        public bool Masked => (Value & 1 << 16) != 0;

        public uint Destination => (uint)(Value >> 56) | (uint)(Value >> 49 & 0x7f) << 8;

        /// <summary>NMI, SMI, INIT and ExtINT are edges whatever the trigger bit says.</summary>
        public bool IsLevel => LevelTriggered && (Mode is DeliveryMode.Fixed or DeliveryMode.LowestPriority);
    }

    /// <summary>The redirection table.</summary>
    [InlineArray(PinCount)]
    public struct Redirections : IEquatable<Redirections>
    {
        private ulong _first;

        public readonly bool Equals(Redirections other) => ((ReadOnlySpan<ulong>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Redirections other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[PinCount - 1]);

        public static bool operator ==(Redirections a, Redirections b) => a.Equals(b);

        public static bool operator !=(Redirections a, Redirections b) => !a.Equals(b);
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        /// <summary>APIC ID, bits 27:24 of its register.</summary>
        public byte Id;

        /// <summary>The index register.</summary>
        public byte Select;

        /// <summary>The pins' levels, one bit each.</summary>
        public uint Levels;

        public Redirections Table;
    }

    // Configuration
    private readonly byte _initialId;

    // Wiring
    private readonly ApicBus _bus;

    // State
    private readonly Lock _lock = new();
    private readonly IIrqLine[] _pins = new IIrqLine[PinCount];
    private State _state;

    /// <param name="bus">Carries the messages; the I/O APIC attaches itself for EOIs.</param>
    /// <param name="id">The ID it shows after reset, 0 to 15. Nothing is routed by it.</param>
    public IoApic(ApicBus bus, byte id = 0)
    {
        _bus = bus;
        _initialId = (byte)(id & 0xf);
        for (int pin = 0; pin < PinCount; pin++)
        {
            int number = pin;
            _pins[pin] = IrqLine.From(asserted =>
            {
                if (_bus.Kernel is { HasWires: true } kernel)
                    kernel.SetPin(number, asserted);
                else
                    SetPin(number, asserted);
            });
        }
        ResetState();
        bus.Attach(this);
    }

    /// <summary>The wire to an input pin.</summary>
    public IIrqLine Pin(int number) => _pins[number];

    public ulong Read(ulong offset, AccessSize size)
    {
        lock (_lock)
        {
            return (Offset)offset switch
            {
                Offset.Select => _state.Select,
                Offset.Window => ReadIndexed(),
                _ => 0,
            };
        }
    }

    public void Write(ulong offset, AccessSize size, ulong value)
    {
        switch ((Offset)offset)
        {
            case Offset.Select:
                lock (_lock)
                    _state.Select = (byte)value;
                break;
            case Offset.Window:
                lock (_lock)
                    WriteIndexed((uint)value);
                break;
            case Offset.Eoi:
                EndOfInterrupt((byte)value);
                break;
            default:
                break;
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            ResetState();
            for (int pin = 0; pin < PinCount; pin++)
                TellRoute(pin);
        }
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            for (int pin = 0; pin < PinCount; pin++)
                TellRoute(pin);
        }
    }

    /// <summary>An EOI for a level-triggered vector, broadcast by a local APIC or written to the EOI register.</summary>
    internal void EndOfInterrupt(byte vector)
    {
        lock (_lock)
        {
            for (int pin = 0; pin < PinCount; pin++)
            {
                Entry entry = new(_state.Table[pin]);
                if (!entry.RemoteIrr || entry.Vector != vector)
                    continue;
                _state.Table[pin] &= ~Entry.RemoteIrrBit;
                ServiceLevel(pin);
            }
        }
    }

    /// <summary>Tries again to deliver levels that no local APIC took.</summary>
    internal void Retry()
    {
        lock (_lock)
        {
            for (int pin = 0; pin < PinCount; pin++)
                ServiceLevel(pin);
        }
    }

    private void ResetState()
    {
        uint levels = _state.Levels;
        _state = default;
        _state.Id = _initialId;
        _state.Levels = levels;
        for (int pin = 0; pin < PinCount; pin++)
            _state.Table[pin] = 1 << 16;
    }

    private void SetPin(int pin, bool asserted)
    {
        lock (_lock)
        {
            uint bit = 1u << pin;
            bool before = (_state.Levels & bit) != 0;
            if (before == asserted)
                return;
            _state.Levels = asserted ? _state.Levels | bit : _state.Levels & ~bit;
            if (!asserted)
                return;
            Entry entry = new(_state.Table[pin]);
            if (entry.IsLevel)
                ServiceLevel(pin);
            else if (!entry.Masked)
                Send(entry);
        }
    }

    private void ServiceLevel(int pin)
    {
        Entry entry = new(_state.Table[pin]);
        if ((_state.Levels & 1u << pin) == 0 || !entry.IsLevel || entry.Masked || entry.RemoteIrr)
            return;
        if (Send(entry))
            _state.Table[pin] |= Entry.RemoteIrrBit;
    }

    private bool Send(Entry entry) => _bus.Deliver(Message(entry));

    private static ApicMessage Message(Entry entry) => new(entry.Mode, entry.Vector, entry.IsLevel, entry.Destination, entry.Logical);

    private uint ReadIndexed()
    {
        switch ((Index)_state.Select)
        {
            case Index.Id:
            case Index.Arbitration:
                return (uint)_state.Id << 24;
            case Index.Version:
                return 0x20 | (PinCount - 1) << 16;
            case >= Index.FirstRedirection and <= Index.LastRedirection:
                int at = _state.Select - (int)Index.FirstRedirection;
                return (uint)(_state.Table[at >> 1] >> (at & 1) * 32);
            default:
                return 0;
        }
    }

    private void WriteIndexed(uint value)
    {
        switch ((Index)_state.Select)
        {
            case Index.Id:
                _state.Id = (byte)(value >> 24 & 0xf);
                break;
            case >= Index.FirstRedirection and <= Index.LastRedirection:
                int at = _state.Select - (int)Index.FirstRedirection;
                WriteEntry(at >> 1, value, high: (at & 1) != 0);
                break;
            default:
                break;
        }
    }

    private void WriteEntry(int pin, uint value, bool high)
    {
        ulong old = _state.Table[pin];
        ulong merged = high ? (uint)old | (ulong)value << 32 : (old & 0xffff_ffff_0000_0000) | value;
        ulong entry = (merged & Entry.Writable) | (old & Entry.RemoteIrrBit);
        // Software of old clears remote IRR by a turn through edge mode, which the EOI register made needless.
        if (!new Entry(entry).LevelTriggered)
            entry &= ~Entry.RemoteIrrBit;
        _state.Table[pin] = entry;
        TellRoute(pin);
        ServiceLevel(pin);
    }

    /// <summary>Local APICs that are the accelerator's have to know whose EOIs to give back.</summary>
    private void TellRoute(int pin)
    {
        if (_bus.Kernel is not { HasWires: false } kernel)
            return;
        Entry entry = new(_state.Table[pin]);
        ApicMessage message = Message(entry);
        kernel.SetRoute(pin, entry.Masked ? null : (message.MsiAddress, message.MsiData));
    }
}
