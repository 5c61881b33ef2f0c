using System;

namespace Kvasir.Devices.Chipset;

/// <summary>Ports and command words of the 8259A.</summary>
public sealed partial class Pic8259
{
    private const ushort MasterCommand = 0x20;
    private const ushort MasterData = 0x21;
    private const ushort SlaveCommand = 0xa0;
    private const ushort SlaveData = 0xa1;
    private const ushort MasterTrigger = 0x4d0;
    private const ushort SlaveTrigger = 0x4d1;
    private const int CascadeInput = 2;

    [Flags]
    private enum Icw1 : byte
    {
        None = 0,
        NeedsIcw4 = 1 << 0,
        Single = 1 << 1,
        LevelTriggered = 1 << 3,
        Initialize = 1 << 4,
    }

    [Flags]
    private enum Icw4 : byte
    {
        None = 0,
        AutoEoi = 1 << 1,
        SpecialFullyNested = 1 << 4,
    }

    [Flags]
    private enum Ocw3 : byte
    {
        None = 0,
        ReadInService = 1 << 0,
        ReadRegister = 1 << 1,
        Poll = 1 << 2,
        Select = 1 << 3,
        SpecialMask = 1 << 5,
        SetSpecialMask = 1 << 6,
    }

    /// <summary>Bits 7:5 of OCW2.</summary>
    private enum Ocw2 : byte
    {
        StopRotateOnAutoEoi = 0,
        NonSpecificEoi = 1,
        NoOperation = 2,
        SpecificEoi = 3,
        RotateOnAutoEoi = 4,
        RotateOnNonSpecificEoi = 5,
        SetPriority = 6,
        RotateOnSpecificEoi = 7,
    }
}
