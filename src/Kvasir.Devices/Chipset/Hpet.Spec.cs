using System;

namespace Kvasir.Devices.Chipset;

/// <summary>Register map of the IA-PC HPET specification.</summary>
public sealed partial class Hpet
{
    private enum Register : ulong
    {
        Capabilities = 0x000,
        Configuration = 0x010,
        InterruptStatus = 0x020,
        Counter = 0x0f0,
        FirstTimer = 0x100,
    }

    /// <summary>Offsets in each comparator's registers.</summary>
    private enum TimerRegister : ulong
    {
        Configuration = 0x00,
        Comparator = 0x08,
        Message = 0x10,
        Stride = 0x20,
    }

    [Flags]
    private enum General : ulong
    {
        None = 0,
        Enable = 1 << 0,
        LegacyReplacement = 1 << 1,
        Writable = Enable | LegacyReplacement,
    }

    [Flags]
    private enum Timer : ulong
    {
        None = 0,
        LevelTriggered = 1 << 1,
        InterruptEnable = 1 << 2,
        Periodic = 1 << 3,
        PeriodicCapable = 1 << 4,
        Wide = 1 << 5,
        SetValue = 1 << 6,
        Mode32 = 1 << 8,
        RouteMask = 0x1f << 9,
        MessageEnable = 1 << 14,
        MessageCapable = 1 << 15,
        Writable = LevelTriggered | InterruptEnable | Periodic | SetValue | Mode32 | RouteMask | MessageEnable,
    }
}
