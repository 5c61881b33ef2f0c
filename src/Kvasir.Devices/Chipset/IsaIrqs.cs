using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The sixteen ISA interrupt requests of a PC: each drives an 8259 input and an I/O APIC pin at once, request 0 the pin 2 (the interrupt
/// source override that the ACPI and MP tables tell of).
/// </summary>
public sealed class IsaIrqs
{
    public const int Count = 16;

    // Wiring
    private readonly IIrqLine[] _lines = new IIrqLine[Count];
    private readonly IIrqLine[] _picInputs = new IIrqLine[Count];

    public IsaIrqs(Pic8259 pic, IoApic ioApic)
    {
        for (int irq = 0; irq < Count; irq++)
        {
            if (irq == 2)
            {
                _lines[irq] = _picInputs[irq] = IrqLine.None;
                continue;
            }
            OrGate gate = new(pic.Input(irq));
            _lines[irq] = new IrqFanOut(gate.AddInput(), ioApic.Pin(PinOf(irq)));
            _picInputs[irq] = gate.AddInput();
        }
    }

    /// <summary>The I/O APIC pin, which is also the GSI, of an ISA interrupt request.</summary>
    public static int PinOf(int irq) => irq == 0 ? 2 : irq;

    /// <summary>
    /// The wire of ISA interrupt request 0 to 15, for one source; several share it through an <see cref="OrGate"/>. Request 2
    /// leads nowhere.
    /// </summary>
    public IIrqLine Line(int irq) => _lines[irq];

    /// <summary>A wire to the 8259 input of a request alone, for a PCI interrupt that is routed to it.</summary>
    public IIrqLine PicInput(int irq) => _picInputs[irq];
}

/// <summary>A wire that ends at two inputs.</summary>
public sealed class IrqFanOut(IIrqLine first, IIrqLine second) : IIrqLine
{
    public void Set(bool asserted)
    {
        first.Set(asserted);
        second.Set(asserted);
    }
}

/// <summary>A shared level-triggered wire: asserted while any of its inputs is.</summary>
/// <remarks>
/// The output is driven under the gate's lock, so that it follows the inputs in order. It comes after the devices in the lock
/// order.
/// </remarks>
public sealed class OrGate
{
    // Wiring
    private readonly IIrqLine _output;

    // State
    private readonly Lock _lock = new();
    private ulong _asserted;
    private int _inputs;

    public OrGate(IIrqLine output)
    {
        _output = output;
    }

    /// <summary>Makes a further input, 64 at most.</summary>
    public IIrqLine AddInput()
    {
        int number = Interlocked.Increment(ref _inputs) - 1;
        if (number >= 64)
            throw new InvalidOperationException("an OR gate has 64 inputs");
        ulong bit = 1ul << number;
        return IrqLine.From(asserted => Set(bit, asserted));
    }

    private void Set(ulong bit, bool asserted)
    {
        lock (_lock)
        {
            _asserted = asserted ? _asserted | bit : _asserted & ~bit;
            _output.Set(_asserted != 0);
        }
    }
}
