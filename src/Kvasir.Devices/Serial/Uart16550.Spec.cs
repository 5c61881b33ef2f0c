using System;
using System.Runtime.CompilerServices;

namespace Kvasir.Devices.Serial;

/// <summary>Register map of the PC16550D.</summary>
public sealed partial class Uart16550
{
    private const int FifoSize = 16;

    /// <summary>The baud clock at a divisor of 1: 1.8432 MHz over 16.</summary>
    private const long BaudBase = 115_200;

    private enum Register : byte
    {
        /// <summary>RBR, THR; DLL with DLAB.</summary>
        Data = 0,

        /// <summary>IER; DLM with DLAB.</summary>
        InterruptEnable = 1,

        /// <summary>IIR; FCR when written.</summary>
        InterruptIdentification = 2,
        LineControl = 3,
        ModemControl = 4,
        LineStatus = 5,
        ModemStatus = 6,
        Scratch = 7,
    }

    [Flags]
    private enum Ier : byte
    {
        None = 0,
        ReceivedData = 1 << 0,
        TransmitterEmpty = 1 << 1,
        LineStatus = 1 << 2,
        ModemStatus = 1 << 3,
        All = 0xf,
    }

    /// <summary>IIR bits 3:0, highest priority first.</summary>
    private enum Source : byte
    {
        LineStatus = 0x6,
        ReceivedData = 0x4,
        Timeout = 0xc,
        TransmitterEmpty = 0x2,
        ModemStatus = 0x0,
        None = 0x1,
    }

    [Flags]
    private enum Fcr : byte
    {
        None = 0,
        Enable = 1 << 0,
        ResetReceiver = 1 << 1,
        ResetTransmitter = 1 << 2,
        DmaMode = 1 << 3,
        TriggerMask = 3 << 6,
    }

    [Flags]
    private enum Lcr : byte
    {
        None = 0,
        WordLength = 3,
        TwoStopBits = 1 << 2,
        Parity = 1 << 3,
        Break = 1 << 6,
        DivisorLatch = 1 << 7,
    }

    [Flags]
    private enum Mcr : byte
    {
        None = 0,
        Dtr = 1 << 0,
        Rts = 1 << 1,
        Out1 = 1 << 2,
        Out2 = 1 << 3,
        Loop = 1 << 4,
        All = 0x1f,
    }

    [Flags]
    private enum Lsr : byte
    {
        None = 0,
        DataReady = 1 << 0,
        Overrun = 1 << 1,
        ParityError = 1 << 2,
        FramingError = 1 << 3,
        Break = 1 << 4,
        Errors = Overrun | ParityError | FramingError | Break,
        TransmitterEmpty = 1 << 5,
        TransmitterIdle = 1 << 6,
        FifoError = 1 << 7,
    }

    [Flags]
    private enum Msr : byte
    {
        None = 0,
        DeltaCts = 1 << 0,
        DeltaDsr = 1 << 1,
        TrailingRi = 1 << 2,
        DeltaDcd = 1 << 3,
        Deltas = 0xf,
        Cts = 1 << 4,
        Dsr = 1 << 5,
        Ri = 1 << 6,
        Dcd = 1 << 7,
        Connected = Cts | Dsr | Dcd,
    }

    /// <summary>A FIFO's contents: a character in bits 7:0, its line status bits in 15:8.</summary>
    [InlineArray(FifoSize)]
    public struct Characters : IEquatable<Characters>
    {
        private ushort _first;

        public readonly bool Equals(Characters other) => ((ReadOnlySpan<ushort>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Characters other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[FifoSize - 1]);

        public static bool operator ==(Characters a, Characters b) => a.Equals(b);

        public static bool operator !=(Characters a, Characters b) => !a.Equals(b);
    }

    /// <summary>A first-in, first-out queue of up to 16 characters.</summary>
    public record struct Fifo
    {
        public Characters Items;
        public byte First;
        public byte Count;

        public readonly ushort Peek() => Items[First];

        public ushort Pop()
        {
            ushort item = Items[First];
            First = (byte)((First + 1) % FifoSize);
            Count--;
            return item;
        }

        public void Push(ushort item)
        {
            Items[(First + Count) % FifoSize] = item;
            Count++;
        }

        public void Clear() => this = default;
    }
}
