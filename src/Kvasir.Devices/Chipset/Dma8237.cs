using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The two cascaded Intel 8237A DMA controllers of a PC with their page registers (Intel 8237A datasheet, order number 231466;
/// 82371SB for pages): byte
/// channels 0-3 at ports 00h-0Fh, word channels 5-7 at C0h-DFh, pages at 81h-8Fh.
/// </summary>
/// <remarks>
/// A device that does DMA asks for bytes with <see cref="Transfer"/>, on its own thread, holding none of its locks that its port
/// handlers take.
/// </remarks>
public sealed class Dma8237 : IPortDevice, IStateful<Dma8237.State>, IResettable
{
    private const ushort BytePorts = 0x00;
    private const ushort PagePorts = 0x81;
    private const int PageCount = 15;
    private const ushort WordPorts = 0xc0;
    private const int CascadeChannel = 4;
    private const int ChannelCount = 8;

    /// <summary>Registers of one controller after its eight address and count registers.</summary>
    private enum Register : byte
    {
        /// <summary>Status; command when written.</summary>
        Command = 8,
        Request = 9,
        SingleMask = 10,
        Mode = 11,
        ClearFlipFlop = 12,

        /// <summary>Temporary; master clear when written.</summary>
        MasterClear = 13,
        ClearMask = 14,
        AllMask = 15,
    }

    [Flags]
    private enum Mode : byte
    {
        None = 0,
        TransferMask = 3 << 2,

        /// <summary>From the device to memory.</summary>
        Write = 1 << 2,

        /// <summary>From memory to the device.</summary>
        Read = 2 << 2,
        AutoInitialize = 1 << 4,
        Decrement = 1 << 5,
        Cascade = 3 << 6,
    }

    private const byte CommandDisable = 1 << 2;

    /// <summary>One channel: base and current registers.</summary>
    public record struct Channel
    {
        public ushort BaseAddress;
        public ushort BaseCount;
        public ushort Address;
        public ushort Count;
        public byte Mode;
        public byte Page;
    }

    [InlineArray(ChannelCount)]
    public struct Channels : IEquatable<Channels>
    {
        private Channel _first;

        public readonly bool Equals(Channels other)
        {
            for (int i = 0; i < ChannelCount; i++)
            {
                if (this[i] != other[i])
                    return false;
            }
            return true;
        }

        public override readonly bool Equals(object? obj) => obj is Channels other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[ChannelCount - 1]);

        public static bool operator ==(Channels a, Channels b) => a.Equals(b);

        public static bool operator !=(Channels a, Channels b) => !a.Equals(b);
    }

    /// <summary>The page registers without a channel, which read back what was written.</summary>
    [InlineArray(PageCount)]
    public struct Pages : IEquatable<Pages>
    {
        private byte _first;

        public readonly bool Equals(Pages other) => ((ReadOnlySpan<byte>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Pages other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[PageCount - 1]);

        public static bool operator ==(Pages a, Pages b) => a.Equals(b);

        public static bool operator !=(Pages a, Pages b) => !a.Equals(b);
    }

    /// <summary>What the channels of one controller share.</summary>
    public record struct Controller
    {
        public byte Command;
        public byte Mask;
        public byte Request;
        public byte TerminalCounts;
        public bool HighByte;
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public Channels Channels;
        public Pages Pages;
        public Controller Byte;
        public Controller Word;
    }

    // Wiring
    private readonly GuestMemory _memory;

    // State
    private readonly Lock _lock = new();
    private State _state;

    public Dma8237(GuestMemory memory)
    {
        _memory = memory;
        ResetState();
    }

    /// <summary>Claims the ports of both controllers and the page registers.</summary>
    public void Map(PortBus bus)
    {
        bus.Map(BytePorts, 16, this);
        bus.Map(PagePorts, PageCount, this);
        bus.Map(WordPorts, 32, this);
    }

    /// <summary>
    /// Moves bytes between a device and memory through a channel, until the channel's count runs out: single or block mode without the bus
    /// cycles.
    /// </summary>
    /// <param name="channel">0 to 3 for bytes, 5 to 7 for words (then whole words are moved).</param>
    /// <param name="data">What the device gives, or where it takes.</param>
    /// <param name="toMemory">The direction the device moves; the guest must have programmed the same.</param>
    /// <param name="terminalCount">The channel's count ran out.</param>
    /// <returns>Bytes moved: fewer than asked for at terminal count, 0 where the guest has masked the channel or programmed
    /// otherwise.</returns>
    public int Transfer(int channel, Span<byte> data, bool toMemory, out bool terminalCount)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)channel, (uint)ChannelCount - 1);
        terminalCount = false;
        lock (_lock)
        {
            ref Controller controller = ref ControllerOf(channel);
            ref Channel registers = ref _state.Channels[channel];
            byte bit = (byte)(1 << (channel & 3));
            Mode direction = toMemory ? Mode.Write : Mode.Read;
            if (channel == CascadeChannel || (controller.Command & CommandDisable) != 0 || (controller.Mask & bit) != 0
                || ((Mode)registers.Mode & Mode.TransferMask) != direction)
                return 0;
            int unit = channel < CascadeChannel ? 1 : 2;
            int moved = 0;
            while (moved + unit <= data.Length && !terminalCount)
            {
                Gpa address = AddressOf(channel, registers);
                Span<byte> item = data.Slice(moved, unit);
                if (toMemory)
                    _ = _memory.TryWrite(address, item);
                else if (!_memory.TryRead(address, item))
                    item.Fill(0xff);
                moved += unit;
                registers.Address = (ushort)(((Mode)registers.Mode & Mode.Decrement) != 0 ? registers.Address - 1 : registers.Address + 1);
                terminalCount = registers.Count-- == 0;
            }
            if (terminalCount)
                Finish(ref controller, ref registers, bit);
            return moved;
        }
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            if (port >= WordPorts)
                return ReadController(ref _state.Word, (port - WordPorts) >> 1, CascadeChannel);
            if (port < PagePorts)
                return ReadController(ref _state.Byte, port, 0);
            int channel = ChannelOfPage(port);
            return channel >= 0 ? _state.Channels[channel].Page : _state.Pages[port - PagePorts];
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        byte data = (byte)value;
        lock (_lock)
        {
            if (port >= WordPorts)
            {
                WriteController(ref _state.Word, (port - WordPorts) >> 1, CascadeChannel, data);
            }
            else if (port < PagePorts)
            {
                WriteController(ref _state.Byte, port, 0, data);
            }
            else
            {
                int channel = ChannelOfPage(port);
                if (channel >= 0)
                    _state.Channels[channel].Page = data;
                else
                    _state.Pages[port - PagePorts] = data;
            }
        }
    }

    public void Reset()
    {
        lock (_lock)
            ResetState();
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
            _state = state;
    }

    /// <summary>The channel whose page register is at a port, or -1.</summary>
    private static int ChannelOfPage(ushort port) => port switch
    {
        0x87 => 0,
        0x83 => 1,
        0x81 => 2,
        0x82 => 3,
        0x8f => 4,
        0x8b => 5,
        0x89 => 6,
        0x8a => 7,
        _ => -1,
    };

    /// <summary>Word channels count words: their address is shifted and the page's lowest bit is not used.</summary>
    private static Gpa AddressOf(int channel, in Channel registers) => channel < CascadeChannel
        ? new Gpa((ulong)registers.Page << 16 | registers.Address)
        : new Gpa((ulong)(registers.Page & 0xfe) << 16 | (ulong)registers.Address << 1);

    private static void Finish(ref Controller controller, ref Channel registers, byte bit)
    {
        controller.TerminalCounts |= bit;
        controller.Request &= (byte)~bit;
        if (((Mode)registers.Mode & Mode.AutoInitialize) != 0)
        {
            registers.Address = registers.BaseAddress;
            registers.Count = registers.BaseCount;
        }
        else
        {
            controller.Mask |= bit;
        }
    }

    private static void MasterClear(ref Controller controller)
    {
        controller = default;
        controller.Mask = 0xf;
    }

    private void ResetState()
    {
        _state = default;
        MasterClear(ref _state.Byte);
        MasterClear(ref _state.Word);
    }

    private ref Controller ControllerOf(int channel)
    {
        if (channel < CascadeChannel)
            return ref _state.Byte;
        return ref _state.Word;
    }

    private uint ReadController(ref Controller controller, int register, int first)
    {
        if (register < 8)
        {
            ref Channel channel = ref _state.Channels[first + register / 2];
            ushort value = (register & 1) == 0 ? channel.Address : channel.Count;
            bool high = controller.HighByte;
            controller.HighByte = !high;
            return (uint)(high ? value >> 8 : value & 0xff);
        }
        switch ((Register)register)
        {
            case Register.Command:
                uint status = (uint)(controller.TerminalCounts | controller.Request << 4);
                controller.TerminalCounts = 0;
                return status;
            case Register.AllMask:
                // As on the 82371SB: the upper bits read as ones.
                return controller.Mask | 0xf0u;
            default:
                return 0;
        }
    }

    private void WriteController(ref Controller controller, int register, int first, byte value)
    {
        if (register < 8)
        {
            WriteChannel(ref controller, ref _state.Channels[first + register / 2], count: (register & 1) != 0, value);
            return;
        }
        byte bit = (byte)(1 << (value & 3));
        switch ((Register)register)
        {
            case Register.Command:
                controller.Command = value;
                break;
            case Register.Request:
                controller.Request = (byte)((value & 4) != 0 ? controller.Request | bit : controller.Request & ~bit);
                break;
            case Register.SingleMask:
                controller.Mask = (byte)((value & 4) != 0 ? controller.Mask | bit : controller.Mask & ~bit);
                break;
            case Register.Mode:
                _state.Channels[first + (value & 3)].Mode = (byte)(value & ~3);
                break;
            case Register.ClearFlipFlop:
                controller.HighByte = false;
                break;
            case Register.MasterClear:
                MasterClear(ref controller);
                break;
            case Register.ClearMask:
                controller.Mask = 0;
                break;
            default:
                controller.Mask = (byte)(value & 0xf);
                break;
        }
    }

    private static void WriteChannel(ref Controller controller, ref Channel channel, bool count, byte value)
    {
        ref ushort target = ref channel.BaseAddress;
        if (count)
            target = ref channel.BaseCount;
        target = (ushort)(controller.HighByte ? (target & 0xff) | value << 8 : (target & 0xff00) | value);
        controller.HighByte = !controller.HighByte;
        // Writing a base register loads the current one too.
        if (count)
            channel.Count = target;
        else
            channel.Address = target;
    }
}
