using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Serial;

/// <summary>
/// A 16550A serial port (National Semiconductor PC16550D datasheet) as PCs have it: OUT2 gates the interrupt line.
/// </summary>
/// <remarks>
/// Characters cross at the speed of the back end, not of the baud rate. No byte is lost: while the back end is full the
/// transmitter is busy (THRE stays
/// clear), and input is taken only as the receiver FIFO has room.
/// </remarks>
public sealed partial class Uart16550 : IPortDevice, ICharacterDevice, IStateful<Uart16550.State>, IResettable
{
    /// <summary>Ports it takes.</summary>
    public const int PortCount = 8;

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public byte InterruptEnable;
        public byte FifoControl;
        public byte LineControl;
        public byte ModemControl;
        public byte LineErrors;
        public byte ModemStatus;
        public byte Scratch;
        public ushort Divisor;
        public Fifo Receiver;
        public Fifo Transmitter;

        /// <summary>The transmitter ran empty and IIR did not say so yet.</summary>
        public bool TransmitterInterrupt;

        /// <summary>Characters waited for four character times.</summary>
        public bool Timeout;
    }

    // Configuration
    private readonly ushort _base;
    private readonly bool _flowControl;

    // Wiring
    private readonly IIrqLine _irq;
    private readonly ICharacterBackend _backend;
    private readonly VmClock _clock;
    private readonly VmTimer _timeout;

    // State
    private readonly Lock _lock = new();
    private State _state;
    private bool _connected = true;
    private bool _refusedInput;
    private long _timeoutAt;

    /// <param name="port">The first of its eight ports: 3F8h for COM1.</param>
    /// <param name="flowControl">Input waits while the guest holds RTS inactive.</param>
    public Uart16550(ushort port, IIrqLine irq, ICharacterBackend backend, VmClock clock, bool flowControl = false)
    {
        _base = port;
        _irq = irq;
        _backend = backend;
        _clock = clock;
        _flowControl = flowControl;
        _timeout = clock.CreateTimer(OnTimeout);
        _state = PowerOn();
        backend.Attach(this);
    }

    private bool FifoEnabled => (_state.FifoControl & (byte)Fcr.Enable) != 0;

    private bool Looped => (_state.ModemControl & (byte)Mcr.Loop) != 0;

    private bool DivisorLatched => (_state.LineControl & (byte)Lcr.DivisorLatch) != 0;

    private int Capacity => FifoEnabled ? FifoSize : 1;

    private int TriggerLevel => !FifoEnabled ? 1 : (_state.FifoControl >> 6) switch
    {
        0 => 1,
        1 => 4,
        2 => 8,
        _ => 14,
    };

    private byte WordMask => (byte)(0xff >> (3 - (_state.LineControl & (byte)Lcr.WordLength)));

    /// <summary>Claims its eight ports.</summary>
    public void Map(PortBus bus) => bus.Map(_base, PortCount, this);

    public uint ReadPort(ushort port, AccessSize size)
    {
        bool resume = false;
        uint value;
        lock (_lock)
        {
            switch ((Register)(port - _base))
            {
                case Register.Data:
                    value = DivisorLatched ? (byte)_state.Divisor : ReadData(out resume);
                    break;
                case Register.InterruptEnable:
                    value = DivisorLatched ? (uint)_state.Divisor >> 8 : _state.InterruptEnable;
                    break;
                case Register.InterruptIdentification:
                    value = ReadIdentification();
                    break;
                case Register.LineControl:
                    value = _state.LineControl;
                    break;
                case Register.ModemControl:
                    value = _state.ModemControl;
                    break;
                case Register.LineStatus:
                    value = (uint)LineStatus();
                    _state.LineErrors = 0;
                    break;
                case Register.ModemStatus:
                    value = _state.ModemStatus;
                    _state.ModemStatus &= (byte)~Msr.Deltas;
                    break;
                default:
                    value = _state.Scratch;
                    break;
            }
            Update();
        }
        if (resume)
            _backend.ResumeInput();
        return value;
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        byte data = (byte)value;
        bool resume;
        lock (_lock)
        {
            switch ((Register)(port - _base))
            {
                case Register.Data:
                    if (DivisorLatched)
                        _state.Divisor = (ushort)((_state.Divisor & 0xff00) | data);
                    else
                        Transmit((byte)(data & WordMask));
                    break;
                case Register.InterruptEnable:
                    if (DivisorLatched)
                        _state.Divisor = (ushort)((_state.Divisor & 0xff) | data << 8);
                    else
                        SetInterruptEnable(data);
                    break;
                case Register.InterruptIdentification:
                    SetFifoControl(data);
                    break;
                case Register.LineControl:
                    SetLineControl(data);
                    break;
                case Register.ModemControl:
                    _state.ModemControl = (byte)(data & (byte)Mcr.All);
                    UpdateModemStatus();
                    Drain();
                    break;
                case Register.Scratch:
                    _state.Scratch = data;
                    break;
                default:
                    // Line and modem status are written in factory tests alone.
                    break;
            }
            Update();
            resume = TakesInput() && TakeRefusal();
        }
        if (resume)
            _backend.ResumeInput();
    }

    public int Receive(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            int taken = TakesInput() ? Math.Min(bytes.Length, Capacity - _state.Receiver.Count) : 0;
            for (int i = 0; i < taken; i++)
                Enqueue((byte)(bytes[i] & WordMask));
            _refusedInput |= taken < bytes.Length;
            Update();
            return taken;
        }
    }

    public void OutputPossible()
    {
        lock (_lock)
        {
            Drain();
            Update();
        }
    }

    public void ReceiveBreak()
    {
        lock (_lock)
        {
            if (Looped)
                return;
            EnqueueBreak();
            Update();
        }
    }

    public void SetConnected(bool connected)
    {
        lock (_lock)
        {
            _connected = connected;
            UpdateModemStatus();
            Update();
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            _state = PowerOn();
            _timeout.Disarm();
            Update();
        }
        _backend.ResumeInput();
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
            UpdateModemStatus();
            ArmTimeout();
            Drain();
            Update();
        }
    }

    private State PowerOn() => new()
    {
        Divisor = 1,
        LineControl = 3,
        ModemStatus = (byte)(_connected ? Msr.Connected : Msr.None),
    };

    private byte ReadData(out bool resume)
    {
        resume = false;
        _state.Timeout = false;
        if (_state.Receiver.Count == 0)
            return 0;
        byte value = (byte)_state.Receiver.Pop();
        NoteErrors();
        ArmTimeout();
        if (_state.Receiver.Count == 0 && TakesInput())
            resume = TakeRefusal();
        return value;
    }

    private byte ReadIdentification()
    {
        Source source = Pending();
        if (source == Source.TransmitterEmpty)
            _state.TransmitterInterrupt = false;
        return (byte)((byte)source | (FifoEnabled ? 0xc0 : 0));
    }

    private Lsr LineStatus()
    {
        Lsr status = (Lsr)_state.LineErrors;
        if (_state.Receiver.Count > 0)
            status |= Lsr.DataReady;
        if (_state.Transmitter.Count == 0)
            status |= Lsr.TransmitterEmpty | Lsr.TransmitterIdle;
        if (FifoEnabled)
        {
            for (int i = 0; i < _state.Receiver.Count; i++)
            {
                if (_state.Receiver.Items[(_state.Receiver.First + i) % FifoSize] >> 8 != 0)
                    status |= Lsr.FifoError;
            }
        }
        return status;
    }

    private Source Pending()
    {
        Ier enabled = (Ier)_state.InterruptEnable;
        if ((enabled & Ier.LineStatus) != 0 && _state.LineErrors != 0)
            return Source.LineStatus;
        if ((enabled & Ier.ReceivedData) != 0)
        {
            if (_state.Receiver.Count >= TriggerLevel)
                return Source.ReceivedData;
            if (_state.Timeout)
                return Source.Timeout;
        }
        if ((enabled & Ier.TransmitterEmpty) != 0 && _state.TransmitterInterrupt)
            return Source.TransmitterEmpty;
        if ((enabled & Ier.ModemStatus) != 0 && (_state.ModemStatus & (byte)Msr.Deltas) != 0)
            return Source.ModemStatus;
        return Source.None;
    }

    /// <summary>Drives the interrupt line. In loop mode OUT2 is inactive at the pin, so the line is too.</summary>
    private void Update()
    {
        bool gate = (_state.ModemControl & (byte)(Mcr.Out2 | Mcr.Loop)) == (byte)Mcr.Out2;
        _irq.Set(gate && Pending() != Source.None);
    }

    private void SetInterruptEnable(byte value)
    {
        bool before = (_state.InterruptEnable & (byte)Ier.TransmitterEmpty) != 0;
        _state.InterruptEnable = (byte)(value & (byte)Ier.All);
        // Enabling the transmitter interrupt raises it at once where the transmitter is empty.
        if (!before && (value & (byte)Ier.TransmitterEmpty) != 0 && _state.Transmitter.Count == 0)
            _state.TransmitterInterrupt = true;
    }

    private void SetFifoControl(byte value)
    {
        Fcr control = (Fcr)value;
        bool changed = ((value ^ _state.FifoControl) & (byte)Fcr.Enable) != 0;
        if (changed || (control & Fcr.ResetReceiver) != 0)
        {
            _state.Receiver.Clear();
            _state.Timeout = false;
            _timeout.Disarm();
        }
        if ((changed || (control & Fcr.ResetTransmitter) != 0) && _state.Transmitter.Count > 0)
        {
            _state.Transmitter.Clear();
            _state.TransmitterInterrupt = true;
        }
        // The other bits are taken only together with the enable bit.
        _state.FifoControl = (control & Fcr.Enable) != 0 ? (byte)(control & (Fcr.Enable | Fcr.DmaMode | Fcr.TriggerMask)) : (byte)0;
    }

    private void SetLineControl(byte value)
    {
        bool breaks = (value & ~_state.LineControl & (byte)Lcr.Break) != 0;
        _state.LineControl = value;
        if (breaks && Looped)
            EnqueueBreak();
    }

    private void Transmit(byte value)
    {
        _state.TransmitterInterrupt = false;
        if (Looped)
        {
            if (_state.Receiver.Count >= Capacity)
                _state.LineErrors |= (byte)Lsr.Overrun;
            else
                Enqueue(value);
            _state.TransmitterInterrupt = true;
            return;
        }
        // A guest that does not look at THRE loses characters, as on hardware: a full FIFO takes no more, THR alone is overwritten.
        if (_state.Transmitter.Count >= Capacity && !FifoEnabled)
            _ = _state.Transmitter.Pop();
        if (_state.Transmitter.Count < Capacity)
            _state.Transmitter.Push(value);
        Drain();
    }

    /// <summary>Hands what waits to the back end.</summary>
    private void Drain()
    {
        if (_state.Transmitter.Count == 0)
            return;
        Span<byte> one = stackalloc byte[1];
        while (_state.Transmitter.Count > 0)
        {
            one[0] = (byte)_state.Transmitter.Peek();
            if (_backend.Write(one) == 0)
                return;
            _ = _state.Transmitter.Pop();
        }
        _state.TransmitterInterrupt = true;
    }

    private bool TakesInput() => !Looped && (!_flowControl || (_state.ModemControl & (byte)Mcr.Rts) != 0);

    private bool TakeRefusal()
    {
        bool refused = _refusedInput && _state.Receiver.Count < Capacity;
        if (refused)
            _refusedInput = false;
        return refused;
    }

    private void Enqueue(ushort item)
    {
        _state.Receiver.Push(item);
        if (_state.Receiver.Count == 1)
            NoteErrors();
        // A time-out that was announced stays until a character is read.
        if (!_state.Timeout)
            ArmTimeout();
    }

    private void EnqueueBreak()
    {
        if (_state.Receiver.Count >= Capacity)
            _state.LineErrors |= (byte)Lsr.Overrun;
        else
            Enqueue((byte)Lsr.Break << 8);
    }

    /// <summary>Line status shows the errors of the character at the FIFO's head.</summary>
    private void NoteErrors()
    {
        if (_state.Receiver.Count > 0)
            _state.LineErrors |= (byte)(_state.Receiver.Peek() >> 8);
    }

    /// <summary>The time-out starts anew with each character that comes or is read.</summary>
    private void ArmTimeout()
    {
        if (!FifoEnabled || _state.Receiver.Count == 0)
        {
            _timeout.Disarm();
            return;
        }
        int bits = 7 + (_state.LineControl & (byte)Lcr.WordLength);
        if ((_state.LineControl & (byte)Lcr.Parity) != 0)
            bits++;
        if ((_state.LineControl & (byte)Lcr.TwoStopBits) != 0)
            bits++;
        long divisor = Math.Max(_state.Divisor, (ushort)1);
        // No terminal waits half a second for a character because of a strange divisor.
        long wait = Math.Min(4L * bits * divisor * 1_000_000_000 / BaudBase, 100_000_000);
        _timeoutAt = _clock.Now + wait;
        _timeout.Arm(_timeoutAt);
    }

    private void OnTimeout()
    {
        lock (_lock)
        {
            // A call-back that was overtaken by a character or a read comes too early.
            if (_state.Receiver.Count == 0 || !FifoEnabled || _clock.Now < _timeoutAt)
                return;
            _state.Timeout = true;
            Update();
        }
    }

    private void UpdateModemStatus()
    {
        Msr before = (Msr)_state.ModemStatus;
        Msr now = before & Msr.Deltas;
        Mcr control = (Mcr)_state.ModemControl;
        if (Looped)
        {
            now |= ((control & Mcr.Rts) != 0 ? Msr.Cts : 0) | ((control & Mcr.Dtr) != 0 ? Msr.Dsr : 0)
                | ((control & Mcr.Out1) != 0 ? Msr.Ri : 0) | ((control & Mcr.Out2) != 0 ? Msr.Dcd : 0);
        }
        else if (_connected)
        {
            now |= Msr.Connected;
        }
        Msr changed = before ^ now;
        if ((changed & Msr.Cts) != 0)
            now |= Msr.DeltaCts;
        if ((changed & Msr.Dsr) != 0)
            now |= Msr.DeltaDsr;
        if ((changed & Msr.Dcd) != 0)
            now |= Msr.DeltaDcd;
        if ((before & Msr.Ri) != 0 && (now & Msr.Ri) == 0)
            now |= Msr.TrailingRi;
        _state.ModemStatus = (byte)now;
    }
}
