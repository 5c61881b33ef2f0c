using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// The LPC bridge of the ICH9 (datasheet 316972, ch. 13 "LPC Interface Bridge Registers (D31:F0)"): routes PIRQA-PIRQH to the 8259s by its registers,
/// and to I/O APIC inputs 16-23 of their own.
/// </summary>
/// <remarks>The ACPI block stands where the board put it: PMBASE keeps what is written and moves nothing.</remarks>
public sealed class Ich9Lpc : PciFunction
{
    public const int PirqCount = 8;

    private const byte Unrouted = 0x80;

    private enum Register
    {
        PmBase = 0x40,
        AcpiControl = 0x44,
        GpioBase = 0x48,
        PirqA = 0x60,
        SerialIrqControl = 0x64,
        PirqE = 0x68,
        IoDecode = 0x80,
        IoEnable = 0x82,
        PmConfiguration1 = 0xa0,
        RootComplexBase = 0xf0,
    }

    // Wiring
    private readonly IIrqLine[] _ioApic;
    private readonly IIrqLine[] _pic;

    // State
    private readonly Lock _lock = new();
    private readonly int[] _asserted = new int[PirqCount];
    private ushort _picLevels;

    /// <param name="ioApic">The I/O APIC inputs of PIRQA-PIRQH.</param>
    /// <param name="pic">The sixteen inputs of the 8259s; null entries cannot be routed to.</param>
    /// <param name="pmBase">Where the board's ACPI block stands.</param>
    public Ich9Lpc(IIrqLine[] ioApic, IIrqLine[] pic, ushort pmBase)
        : base("lpc", new PciIdentity(0x8086, 0x2918, PciClass.IsaBridge, Revision: 2, 0x8086, 0x2918))
    {
        _ioApic = ioApic;
        _pic = pic;
        MarkMultifunction();
        SetInitial((int)PciRegister.Command, [0x07, 0x00]);
        SetInitial((int)Register.PmBase, [(byte)(pmBase | 1), (byte)(pmBase >> 8)]);
        Writable16((int)Register.PmBase, 0xff80);
        SetInitial((int)Register.AcpiControl, [0x80]);
        Writable16((int)Register.AcpiControl, 0x0087);
        SetInitial((int)Register.GpioBase, [0x01]);
        Writable16((int)Register.GpioBase, 0xff80);
        for (int pirq = 0; pirq < PirqCount; pirq++)
        {
            SetInitial(RegisterOf(pirq), [Unrouted]);
            Writable8(RegisterOf(pirq), 0x8f);
        }
        SetInitial((int)Register.SerialIrqControl, [0x10]);
        Writable8((int)Register.SerialIrqControl, 0xff);
        Writable16((int)Register.IoDecode, 0x1377);
        Writable16((int)Register.IoEnable, 0x3f0f);
        Writable32((int)Register.PmConfiguration1, 0xffff_ffff);
        Writable32((int)Register.RootComplexBase, 0xffff_c001);
    }

    /// <summary>Drives one of the wires that share a PIRQ: each source says when it begins and when it ends. Any thread.</summary>
    public void SetPirq(int pirq, bool asserted)
    {
        lock (_lock)
        {
            _asserted[pirq] += asserted ? 1 : -1;
            _ioApic[pirq].Set(_asserted[pirq] > 0);
            DrivePic();
        }
    }

    public override void Reset()
    {
        base.Reset();
        lock (_lock)
            DrivePic();
    }

    protected override void WrittenConfig(int offset, int bytes)
    {
        lock (_lock)
            DrivePic();
    }

    private static int RegisterOf(int pirq) => pirq < 4 ? (int)Register.PirqA + pirq : (int)Register.PirqE + pirq - 4;

    private void Writable8(int offset, byte bits)
    {
        if ((offset & 1) == 0)
            Writable16(offset, bits);
        else
            Writable16(offset - 1, (ushort)(bits << 8));
    }

    private void DrivePic()
    {
        ushort levels = 0;
        for (int pirq = 0; pirq < PirqCount; pirq++)
        {
            byte route = (byte)Load(RegisterOf(pirq), 1);
            if ((route & Unrouted) == 0 && _asserted[pirq] > 0)
                levels |= (ushort)(1 << (route & 0xf));
        }
        int changed = levels ^ _picLevels;
        _picLevels = levels;
        for (int irq = 0; changed != 0; irq++, changed >>= 1)
        {
            if ((changed & 1) != 0)
                _pic[irq].Set((levels >> irq & 1) != 0);
        }
    }
}
