using System;
using System.Numerics;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The two cascaded Intel 8259A interrupt controllers of a PC, ports 20h/21h and A0h/A1h, with the edge/level registers 4D0h/4D1h
/// (Intel 8259A datasheet, order number 231468; 82371SB for ELCR). Input 2 of the master is the slave's output.
/// </summary>
/// <remarks>
/// An edge stays latched when its input falls before the acknowledge: devices here pulse their wires faster than hardware can. A
/// level that goes away
/// gives the spurious vector 7, as the datasheet says. Lock order: device, this, local APIC.
/// </remarks>
public sealed partial class Pic8259 : IPortDevice, IInterruptAcknowledge, IStateful<Pic8259.State>, IResettable
{
    /// <summary>State of one of the two chips.</summary>
    public record struct ChipState
    {
        /// <summary>IRR: latched edges and present levels.</summary>
        public byte Request;

        /// <summary>ISR.</summary>
        public byte InService;

        /// <summary>IMR.</summary>
        public byte Mask;

        /// <summary>ELCR: inputs that are level-triggered.</summary>
        public byte Trigger;

        /// <summary>The inputs' levels.</summary>
        public byte Lines;

        public byte VectorBase;

        /// <summary>The input with the lowest priority; the next one has the highest.</summary>
        public byte Lowest;

        /// <summary>Which initialization word comes next (2 to 4); 0 when initialized.</summary>
        public byte NextWord;

        public byte Icw1;
        public byte Icw3;
        public byte Icw4;
        public bool RotateOnAutoEoi;
        public bool SpecialMask;
        public bool ReadInService;
        public bool Poll;
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public ChipState Master;
        public ChipState Slave;
    }

    // Wiring
    private readonly IIrqLine _int;

    // State
    private readonly Lock _lock = new();
    private readonly IIrqLine[] _inputs = new IIrqLine[16];
    private volatile IKernelInterrupts? _kernel;
    private State _state;

    /// <param name="interrupt">The master's INT output.</param>
    public Pic8259(IIrqLine interrupt)
    {
        _int = interrupt;
        for (int i = 0; i < _inputs.Length; i++)
        {
            int number = i;
            _inputs[i] = i == CascadeInput ? IrqLine.None : IrqLine.From(asserted => SetInput(number, asserted));
        }
        _state = PowerOn();
    }

    /// <summary>Has the inputs lead to 8259s that are the accelerator's. Before the guest runs.</summary>
    public void Connect(IKernelInterrupts kernel) => _kernel = kernel;

    /// <summary>The wire to interrupt request input 0 to 15. Input 2 is the cascade and leads nowhere.</summary>
    public IIrqLine Input(int number) => _inputs[number];

    /// <summary>Claims the ports of both chips and of the edge/level registers.</summary>
    public void Map(PortBus bus)
    {
        bus.Map(MasterCommand, 2, this);
        bus.Map(SlaveCommand, 2, this);
        bus.Map(MasterTrigger, 2, this);
    }

    public int Acknowledge()
    {
        lock (_lock)
        {
            int input = TakeInterrupt(ref _state.Master, master: true);
            int vector;
            if (input == CascadeInput)
            {
                int slave = TakeInterrupt(ref _state.Slave, master: false);
                vector = _state.Slave.VectorBase | (slave < 0 ? 7 : slave);
            }
            else
            {
                vector = _state.Master.VectorBase | (input < 0 ? 7 : input);
            }
            Update();
            return vector;
        }
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            uint value = port switch
            {
                MasterCommand => ReadCommand(ref _state.Master, master: true),
                SlaveCommand => ReadCommand(ref _state.Slave, master: false),
                MasterData => ReadData(ref _state.Master, master: true),
                SlaveData => ReadData(ref _state.Slave, master: false),
                MasterTrigger => _state.Master.Trigger,
                SlaveTrigger => _state.Slave.Trigger,
                _ => 0xff,
            };
            Update();
            return value;
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        byte data = (byte)value;
        lock (_lock)
        {
            switch (port)
            {
                case MasterCommand:
                    WriteCommand(ref _state.Master, data);
                    break;
                case SlaveCommand:
                    WriteCommand(ref _state.Slave, data);
                    break;
                case MasterData:
                    WriteData(ref _state.Master, data);
                    break;
                case SlaveData:
                    WriteData(ref _state.Slave, data);
                    break;
                case MasterTrigger:
                    // Timer, keyboard and cascade, and on the slave RTC and coprocessor, are always edges.
                    SetTrigger(ref _state.Master, (byte)(data & 0xf8));
                    break;
                case SlaveTrigger:
                    SetTrigger(ref _state.Slave, (byte)(data & 0xde));
                    break;
                default:
                    break;
            }
            Update();
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            byte master = _state.Master.Lines;
            byte slave = _state.Slave.Lines;
            _state = PowerOn();
            _state.Master.Lines = master;
            _state.Slave.Lines = slave;
            Update();
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
            Update();
        }
    }

    /// <summary>Until it is initialized a chip keeps quiet.</summary>
    private static State PowerOn()
    {
        ChipState chip = new() { Mask = 0xff, Lowest = 7, NextWord = 1 };
        return new State { Master = chip, Slave = chip };
    }

    private void SetInput(int number, bool asserted)
    {
        if (_kernel is { HasWires: true } kernel)
        {
            kernel.SetPicInput(number, asserted);
            return;
        }
        lock (_lock)
        {
            if (number < 8)
                SetLine(ref _state.Master, number, asserted);
            else
                SetLine(ref _state.Slave, number - 8, asserted);
            Update();
        }
    }

    private static void SetLine(ref ChipState chip, int input, bool asserted)
    {
        byte bit = (byte)(1 << input);
        bool rise = asserted && (chip.Lines & bit) == 0;
        chip.Lines = (byte)(asserted ? chip.Lines | bit : chip.Lines & ~bit);
        if (IsLevel(chip, bit))
            chip.Request = (byte)(asserted ? chip.Request | bit : chip.Request & ~bit);
        else if (rise)
            chip.Request |= bit;
    }

    private static bool IsLevel(in ChipState chip, byte bit) =>
        (chip.Icw1 & (byte)Icw1.LevelTriggered) != 0 || (chip.Trigger & bit) != 0;

    private static void SetTrigger(ref ChipState chip, byte trigger)
    {
        chip.Trigger = trigger;
        chip.Request = (byte)((chip.Request & ~trigger) | (chip.Lines & trigger));
    }

    /// <summary>Drives the cascade and the INT output from the chips' states.</summary>
    private void Update()
    {
        bool slave = Highest(_state.Slave, master: false) >= 0;
        const byte cascade = 1 << CascadeInput;
        _state.Master.Lines = (byte)(slave ? _state.Master.Lines | cascade : _state.Master.Lines & ~cascade);
        _state.Master.Request = (byte)(slave ? _state.Master.Request | cascade : _state.Master.Request & ~cascade);
        _int.Set(Highest(_state.Master, master: true) >= 0);
    }

    /// <summary>The input that an acknowledge would serve, or -1.</summary>
    private static int Highest(in ChipState chip, bool master)
    {
        if (chip.NextWord != 0)
            return -1;
        int pending = Rotate(chip.Request & ~chip.Mask, chip.Lowest);
        if (pending == 0)
            return -1;
        int first = BitOperations.TrailingZeroCount(pending);
        int blocking = chip.InService;
        if (chip.SpecialMask)
            blocking &= ~chip.Mask;
        // Special fully nested mode: a further interrupt from the slave passes while one of its others is served.
        if (master && (chip.Icw4 & (byte)Icw4.SpecialFullyNested) != 0)
            blocking &= ~(1 << CascadeInput);
        blocking = Rotate(blocking, chip.Lowest);
        if (blocking != 0 && BitOperations.TrailingZeroCount(blocking) <= first)
            return -1;
        return (first + chip.Lowest + 1) & 7;
    }

    /// <summary>Turns a set of inputs so that bit 0 has the highest priority.</summary>
    private static int Rotate(int set, byte lowest)
    {
        int by = (lowest + 1) & 7;
        set &= 0xff;
        return (set >> by | set << (8 - by)) & 0xff;
    }

    /// <summary>The acknowledge (or poll) of one chip.</summary>
    private static int TakeInterrupt(ref ChipState chip, bool master)
    {
        int input = Highest(chip, master);
        if (input < 0)
            return -1;
        byte bit = (byte)(1 << input);
        if (!IsLevel(chip, bit))
            chip.Request &= (byte)~bit;
        if ((chip.Icw4 & (byte)Icw4.AutoEoi) == 0)
            chip.InService |= bit;
        else if (chip.RotateOnAutoEoi)
            chip.Lowest = (byte)input;
        return input;
    }

    private static uint ReadCommand(ref ChipState chip, bool master)
    {
        if (chip.Poll)
            return ReadPoll(ref chip, master);
        return chip.ReadInService ? chip.InService : chip.Request;
    }

    private static uint ReadData(ref ChipState chip, bool master) => chip.Poll ? ReadPoll(ref chip, master) : chip.Mask;

    private static uint ReadPoll(ref ChipState chip, bool master)
    {
        chip.Poll = false;
        int input = TakeInterrupt(ref chip, master);
        return input < 0 ? 0u : 0x80u | (uint)input;
    }

    private static void WriteCommand(ref ChipState chip, byte value)
    {
        if ((value & (byte)Icw1.Initialize) != 0)
            BeginInitialization(ref chip, value);
        else if ((value & (byte)Ocw3.Select) != 0)
            WriteOcw3(ref chip, value);
        else
            WriteOcw2(ref chip, value);
    }

    private static void BeginInitialization(ref ChipState chip, byte value)
    {
        chip.Icw1 = value;
        chip.NextWord = 2;
        chip.Mask = 0;
        chip.InService = 0;
        chip.Lowest = 7;
        chip.SpecialMask = false;
        chip.ReadInService = false;
        chip.Poll = false;
        chip.RotateOnAutoEoi = false;
        chip.Icw4 = 0;
        // The edge sense circuit is reset: an input must rise again to be seen.
        byte levels = (value & (byte)Icw1.LevelTriggered) != 0 ? (byte)0xff : chip.Trigger;
        chip.Request = (byte)(chip.Lines & levels);
    }

    private static void WriteOcw2(ref ChipState chip, byte value)
    {
        byte level = (byte)(value & 7);
        switch ((Ocw2)(value >> 5))
        {
            case Ocw2.StopRotateOnAutoEoi:
                chip.RotateOnAutoEoi = false;
                break;
            case Ocw2.RotateOnAutoEoi:
                chip.RotateOnAutoEoi = true;
                break;
            case Ocw2.NonSpecificEoi:
                EndHighest(ref chip);
                break;
            case Ocw2.RotateOnNonSpecificEoi:
                int ended = EndHighest(ref chip);
                if (ended >= 0)
                    chip.Lowest = (byte)ended;
                break;
            case Ocw2.SpecificEoi:
                chip.InService &= (byte)~(1 << level);
                break;
            case Ocw2.RotateOnSpecificEoi:
                chip.InService &= (byte)~(1 << level);
                chip.Lowest = level;
                break;
            case Ocw2.SetPriority:
                chip.Lowest = level;
                break;
            default:
                break;
        }
    }

    private static int EndHighest(ref ChipState chip)
    {
        int served = chip.InService;
        // A non-specific EOI does not touch what the special mask mode hides.
        if (chip.SpecialMask)
            served &= ~chip.Mask;
        served = Rotate(served, chip.Lowest);
        if (served == 0)
            return -1;
        int input = (BitOperations.TrailingZeroCount(served) + chip.Lowest + 1) & 7;
        chip.InService &= (byte)~(1 << input);
        return input;
    }

    private static void WriteOcw3(ref ChipState chip, byte value)
    {
        Ocw3 word = (Ocw3)value;
        if ((word & Ocw3.SetSpecialMask) != 0)
            chip.SpecialMask = (word & Ocw3.SpecialMask) != 0;
        if ((word & Ocw3.Poll) != 0)
            chip.Poll = true;
        else if ((word & Ocw3.ReadRegister) != 0)
            chip.ReadInService = (word & Ocw3.ReadInService) != 0;
    }

    private static void WriteData(ref ChipState chip, byte value)
    {
        switch (chip.NextWord)
        {
            case 2:
                chip.VectorBase = (byte)(value & 0xf8);
                chip.NextWord = (chip.Icw1 & (byte)Icw1.Single) == 0 ? (byte)3 : AfterIcw3(chip);
                break;
            case 3:
                chip.Icw3 = value;
                chip.NextWord = AfterIcw3(chip);
                break;
            case 4:
                chip.Icw4 = value;
                chip.NextWord = 0;
                break;
            default:
                chip.Mask = value;
                break;
        }
    }

    private static byte AfterIcw3(in ChipState chip) => (chip.Icw1 & (byte)Icw1.NeedsIcw4) != 0 ? (byte)4 : (byte)0;
}
