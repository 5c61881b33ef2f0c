namespace Kvasir.Devices.Storage;

/// <summary>Operation codes (SPC-4, SBC-3, MMC-6).</summary>
internal enum ScsiOperation : byte
{
    TestUnitReady = 0x00,
    RequestSense = 0x03,
    Read6 = 0x08,
    Write6 = 0x0a,
    Inquiry = 0x12,
    ModeSelect6 = 0x15,
    ModeSense6 = 0x1a,
    StartStopUnit = 0x1b,
    PreventAllowRemoval = 0x1e,
    ReadCapacity10 = 0x25,
    Read10 = 0x28,
    Write10 = 0x2a,
    WriteVerify10 = 0x2e,
    Verify10 = 0x2f,
    SynchronizeCache10 = 0x35,
    WriteSame10 = 0x41,
    Unmap = 0x42,
    ReadToc = 0x43,
    GetConfiguration = 0x46,
    GetEventStatus = 0x4a,
    ModeSelect10 = 0x55,
    ModeSense10 = 0x5a,
    Read16 = 0x88,
    Write16 = 0x8a,
    WriteVerify16 = 0x8e,
    Verify16 = 0x8f,
    SynchronizeCache16 = 0x91,
    WriteSame16 = 0x93,
    ServiceActionIn16 = 0x9e,
    ReportLuns = 0xa0,
    Read12 = 0xa8,
    Write12 = 0xaa,
}

/// <summary>Sense data as key, additional code and its qualifier (SPC-4, 4.5).</summary>
internal readonly record struct ScsiSense(byte Key, byte Code, byte Qualifier)
{
    public static ScsiSense None => default;

    public static ScsiSense NotReadyNoMedium => new(2, 0x3a, 0x00);

    public static ScsiSense ReadError => new(3, 0x11, 0x00);

    public static ScsiSense WriteError => new(3, 0x0c, 0x00);

    public static ScsiSense InvalidOperation => new(5, 0x20, 0x00);

    public static ScsiSense OutOfRange => new(5, 0x21, 0x00);

    public static ScsiSense InvalidField => new(5, 0x24, 0x00);

    public static ScsiSense InvalidParameter => new(5, 0x26, 0x00);

    public static ScsiSense NoSuchUnit => new(5, 0x25, 0x00);

    public static ScsiSense PoweredOn => new(6, 0x29, 0x00);

    public static ScsiSense MediumChanged => new(6, 0x28, 0x00);

    public static ScsiSense CapacityChanged => new(6, 0x2a, 0x09);

    public static ScsiSense WriteProtected => new(7, 0x27, 0x00);

    public static ScsiSense SpaceAllocationFailed => new(7, 0x27, 0x07);

    public bool IsError => Key != 0;
}

/// <summary>Status codes (SAM-5, 5.3.1).</summary>
internal enum ScsiStatus : byte
{
    Good = 0x00,
    CheckCondition = 0x02,
    Busy = 0x08,
}
