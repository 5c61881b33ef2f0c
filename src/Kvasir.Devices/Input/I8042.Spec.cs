using System;

namespace Kvasir.Devices.Input;

/// <summary>Registers and commands of the 8042.</summary>
public sealed partial class I8042
{
    [Flags]
    private enum Status : byte
    {
        None = 0,
        OutputFull = 1 << 0,
        System = 1 << 2,
        Command = 1 << 3,
        Unlocked = 1 << 4,
        AuxiliaryFull = 1 << 5,
    }

    /// <summary>The command byte, RAM location 0.</summary>
    [Flags]
    private enum Mode : byte
    {
        None = 0,
        KeyboardInterrupt = 1 << 0,
        AuxiliaryInterrupt = 1 << 1,
        System = 1 << 2,
        KeyboardDisabled = 1 << 4,
        AuxiliaryDisabled = 1 << 5,
        Translate = 1 << 6,
        AtPowerOn = KeyboardInterrupt | System | Translate,
    }

    [Flags]
    private enum OutputPort : byte
    {
        None = 0,
        NotReset = 1 << 0,
        A20 = 1 << 1,
    }

    private enum Command : byte
    {
        ReadRam = 0x20,
        WriteRam = 0x60,
        TestPassword = 0xa4,
        DisableAuxiliary = 0xa7,
        EnableAuxiliary = 0xa8,
        TestAuxiliary = 0xa9,
        SelfTest = 0xaa,
        TestKeyboard = 0xab,
        DisableKeyboard = 0xad,
        EnableKeyboard = 0xae,
        ReadInputPort = 0xc0,
        ReadOutputPort = 0xd0,
        WriteOutputPort = 0xd1,
        WriteKeyboardBuffer = 0xd2,
        WriteAuxiliaryBuffer = 0xd3,
        WriteAuxiliary = 0xd4,
        DisableA20 = 0xdd,
        EnableA20 = 0xdf,
        ReadTestInputs = 0xe0,
        PulseOutputPort = 0xf0,
    }
}
