namespace Kvasir.Devices.Chipset;

/// <summary>What an interrupt message asks of its target (Intel SDM vol. 3, "Interrupt Command Register": delivery mode).</summary>
public enum DeliveryMode : byte
{
    Fixed = 0,
    LowestPriority = 1,
    Smi = 2,

    /// <summary>Remote read on the 82489DX; reserved since.</summary>
    RemoteRead = 3,
    Nmi = 4,
    Init = 5,
    StartUp = 6,
    ExtInt = 7,
}

/// <summary>Targets that need no destination field.</summary>
public enum DestinationShorthand : byte
{
    None = 0,
    Self = 1,
    AllIncludingSelf = 2,
    AllExcludingSelf = 3,
}

/// <summary>One message on the APIC bus.</summary>
/// <param name="Mode">How the target takes it.</param>
/// <param name="Vector">The interrupt vector; the start page for <see cref="DeliveryMode.StartUp"/>.</param>
/// <param name="Level">The source is level-triggered: the EOI is broadcast to the I/O APICs.</param>
/// <param name="Destination">An APIC ID, or a message destination address in logical mode.</param>
/// <param name="Logical">The destination is matched with LDR (and DFR) instead of the APIC ID.</param>
/// <param name="Wide">The destination has 32 bits (x2APIC); otherwise FFh is the broadcast address.</param>
/// <param name="Redirectable">An MSI with the redirection hint: one of the targets takes it.</param>
public readonly record struct ApicMessage(
    DeliveryMode Mode, byte Vector, bool Level, uint Destination, bool Logical, bool Wide = false, bool Redirectable = false)
{
    /// <summary>Whether every APIC is addressed.</summary>
    public bool IsBroadcast => Destination == (Wide ? 0xffff_ffff : 0xff);

    /// <summary>The message as an MSI's address (Intel SDM vol. 3, "Message Address Register Format"); bits of the destination beyond eight are in the upper half.</summary>
    internal ulong MsiAddress =>
        0xfee0_0000ul | (Destination & 0xff) << 12 | (ulong)(Destination & 0xffff_ff00) << 32 | (Redirectable ? 8u : 0) | (Logical ? 4u : 0);

    /// <summary>Its data ("Message Data Register Format").</summary>
    internal uint MsiData => Vector | (uint)Mode << 8 | (Level ? 3u << 14 : 0);
}
