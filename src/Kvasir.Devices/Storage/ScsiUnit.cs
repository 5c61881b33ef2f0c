using System;
using System.Buffers.Binary;
using System.Text;
using System.Threading;
using Kvasir.Block;

namespace Kvasir.Devices.Storage;

/// <summary>What a command asks of the medium.</summary>
/// <param name="Operation">What to do.</param>
/// <param name="Offset">Where, in bytes.</param>
/// <param name="Length">Bytes.</param>
/// <param name="ForceUnitAccess">Stable when it ends.</param>
/// <param name="Unmap">Zeroed space may be given back.</param>
internal readonly record struct ScsiMediumCommand(BlockOperation Operation, long Offset, long Length, bool ForceUnitAccess = false, bool Unmap = false);

/// <summary>
/// A SCSI logical unit: a disk (SBC-3) or a CD drive (MMC-6). It answers what needs no medium itself, and says what the other commands ask of the medium;
/// whoever carries the commands moves the data.
/// </summary>
public sealed class ScsiUnit
{
    /// <summary>Bytes of the longest answer.</summary>
    internal const int LargestReply = 512;

    private const int CdBlock = 2048;

    /// <summary>Blocks that one UNMAP or WRITE SAME may cover.</summary>
    private const uint MaximumUnmapBlocks = 1 << 22;
    internal const int MaximumUnmapRanges = 255;

    private enum VitalPage : byte
    {
        Supported = 0x00,
        SerialNumber = 0x80,
        Identification = 0x83,
        BlockLimits = 0xb0,
        BlockCharacteristics = 0xb1,
        LogicalProvisioning = 0xb2,
    }

    private enum ModePage : byte
    {
        ReadErrorRecovery = 0x01,
        Caching = 0x08,
        Control = 0x0a,
        CdCapabilities = 0x2a,
        All = 0x3f,
    }

    // State
    private readonly Lock _lock = new();
    private ScsiSense _attention = ScsiSense.PoweredOn;

    public ScsiUnit(Disk disk, int target, int unit)
    {
        Disk = disk;
        Target = target;
        Unit = unit;
        BlockSize = disk.Settings.IsCd ? CdBlock : disk.Settings.LogicalBlock;
        disk.Backend.Resized += () => Attention(ScsiSense.CapacityChanged);
    }

    public Disk Disk { get; }

    public int Target { get; }

    public int Unit { get; }

    /// <summary>Bytes of a logical block.</summary>
    public int BlockSize { get; }

    public bool IsCd => Disk.Settings.IsCd;

    internal ulong Blocks => (ulong)(Disk.Backend.Length / BlockSize);

    /// <summary>Back to power-on.</summary>
    public void Reset() => Attention(ScsiSense.PoweredOn);

    internal void Attention(ScsiSense sense)
    {
        lock (_lock)
            _attention = sense;
    }

    /// <summary>What the initiator has not been told yet; setting it puts a saved one back.</summary>
    internal ScsiSense Pending
    {
        get
        {
            lock (_lock)
                return _attention;
        }
        set => Attention(value);
    }

    /// <summary>Takes what the initiator has not been told yet, with the first command that reports it (SAM-5, 5.14).</summary>
    internal ScsiSense TakeAttention(ScsiOperation operation)
    {
        if (operation is ScsiOperation.Inquiry or ScsiOperation.ReportLuns or ScsiOperation.RequestSense or ScsiOperation.GetConfiguration or ScsiOperation.GetEventStatus)
            return ScsiSense.None;
        lock (_lock)
        {
            ScsiSense attention = _attention;
            _attention = ScsiSense.None;
            return attention;
        }
    }

    /// <summary>Understands a command for the medium.</summary>
    /// <returns>False where it is none: <see cref="Answer"/> has it.</returns>
    internal bool TryMedium(ReadOnlySpan<byte> cdb, out ScsiMediumCommand command, out ScsiSense sense)
    {
        command = default;
        sense = ScsiSense.None;
        ScsiOperation operation = (ScsiOperation)cdb[0];
        bool write = false;
        ulong block;
        uint count;
        switch (operation)
        {
            case ScsiOperation.Read6 or ScsiOperation.Write6:
                block = (uint)((cdb[1] & 0x1f) << 16 | cdb[2] << 8 | cdb[3]);
                count = cdb[4] == 0 ? 256u : cdb[4];
                write = operation == ScsiOperation.Write6;
                break;
            case ScsiOperation.Read10 or ScsiOperation.Write10 or ScsiOperation.WriteVerify10:
                block = BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]);
                count = BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]);
                write = operation != ScsiOperation.Read10;
                break;
            case ScsiOperation.Read12 or ScsiOperation.Write12:
                block = BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]);
                count = BinaryPrimitives.ReadUInt32BigEndian(cdb[6..]);
                write = operation == ScsiOperation.Write12;
                break;
            case ScsiOperation.Read16 or ScsiOperation.Write16 or ScsiOperation.WriteVerify16:
                block = BinaryPrimitives.ReadUInt64BigEndian(cdb[2..]);
                count = BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]);
                write = operation != ScsiOperation.Read16;
                break;
            case ScsiOperation.SynchronizeCache10 or ScsiOperation.SynchronizeCache16:
                command = new ScsiMediumCommand(BlockOperation.Flush, 0, 0);
                return true;
            case ScsiOperation.WriteSame10 or ScsiOperation.WriteSame16:
                return WriteSame(cdb, out command, out sense);
            default:
                return false;
        }
        const byte protect = 0xe0;
        bool six = operation is ScsiOperation.Read6 or ScsiOperation.Write6;
        if (!six && (cdb[1] & protect) != 0)
            sense = ScsiSense.InvalidField;
        else if (write && Disk.IsReadOnly)
            sense = ScsiSense.WriteProtected;
        else if (block > Blocks || count > Blocks - block)
            sense = ScsiSense.OutOfRange;
        bool through = operation is ScsiOperation.WriteVerify10 or ScsiOperation.WriteVerify16 || (!six && (cdb[1] & 8) != 0);
        command = new ScsiMediumCommand(write ? BlockOperation.Write : BlockOperation.Read, (long)block * BlockSize, (long)count * BlockSize, write && through);
        return true;
    }

    /// <summary>Answers a command that needs no medium.</summary>
    /// <param name="reply">Takes the answer; <see cref="LargestReply"/> bytes, zero.</param>
    /// <returns>Bytes of the answer, not yet cut to what was allocated for it.</returns>
    internal int Answer(ReadOnlySpan<byte> cdb, Span<byte> reply, out ScsiSense sense)
    {
        sense = ScsiSense.None;
        switch ((ScsiOperation)cdb[0])
        {
            case ScsiOperation.TestUnitReady or ScsiOperation.StartStopUnit or ScsiOperation.PreventAllowRemoval:
                return 0;
            case ScsiOperation.Inquiry:
                return Inquiry(cdb, reply, ref sense);
            case ScsiOperation.RequestSense:
                return WriteSense(ScsiSense.None, reply, descriptors: (cdb[1] & 1) != 0);
            case ScsiOperation.ModeSense6 or ScsiOperation.ModeSense10:
                return ModeSense(cdb, reply, ref sense);
            case ScsiOperation.ModeSelect6 or ScsiOperation.ModeSelect10:
                // Nothing that the pages show can be changed.
                return 0;
            case ScsiOperation.ReadCapacity10:
                BinaryPrimitives.WriteUInt32BigEndian(reply, (uint)Math.Min(Blocks - 1, uint.MaxValue));
                BinaryPrimitives.WriteInt32BigEndian(reply[4..], BlockSize);
                return 8;
            case ScsiOperation.ServiceActionIn16 when (cdb[1] & 0x1f) == 0x10:
                return ReadCapacity16(reply);
            case ScsiOperation.Verify10 or ScsiOperation.Verify16:
                return Verify(cdb, ref sense);
            case ScsiOperation.ReadToc when IsCd:
                return ReadToc(cdb, reply, ref sense);
            case ScsiOperation.GetConfiguration when IsCd:
                BinaryPrimitives.WriteUInt32BigEndian(reply, 4);
                BinaryPrimitives.WriteUInt16BigEndian(reply[6..], 0x0008);
                return 8;
            case ScsiOperation.GetEventStatus when IsCd:
                return EventStatus(cdb, reply, ref sense);
            default:
                sense = ScsiSense.InvalidOperation;
                return 0;
        }
    }

    /// <summary>Writes fixed or descriptor format sense data (SPC-4, 4.5.2 and 4.5.3).</summary>
    /// <returns>Its length.</returns>
    internal static int WriteSense(ScsiSense sense, Span<byte> into, bool descriptors = false)
    {
        if (descriptors)
        {
            into[0] = 0x72;
            into[1] = sense.Key;
            into[2] = sense.Code;
            into[3] = sense.Qualifier;
            return 8;
        }
        into[0] = 0x70;
        into[2] = sense.Key;
        into[7] = 10;
        into[12] = sense.Code;
        into[13] = sense.Qualifier;
        return 18;
    }

    /// <summary>How many bytes the initiator has allocated for an answer.</summary>
    internal static long Allocated(ReadOnlySpan<byte> cdb) => (ScsiOperation)cdb[0] switch
    {
        ScsiOperation.RequestSense or ScsiOperation.ModeSense6 => cdb[4],
        ScsiOperation.Inquiry => BinaryPrimitives.ReadUInt16BigEndian(cdb[3..]),
        ScsiOperation.ReadCapacity10 => 8,
        ScsiOperation.ServiceActionIn16 => BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]),
        ScsiOperation.ReportLuns => BinaryPrimitives.ReadUInt32BigEndian(cdb[6..]),
        _ => BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]),
    };

    private bool WriteSame(ReadOnlySpan<byte> cdb, out ScsiMediumCommand command, out ScsiSense sense)
    {
        bool wide = cdb[0] == (byte)ScsiOperation.WriteSame16;
        ulong block = wide ? BinaryPrimitives.ReadUInt64BigEndian(cdb[2..]) : BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]);
        uint count = wide ? BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]) : BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]);
        const byte unmap = 8;
        sense = ScsiSense.None;
        if ((cdb[1] & 0xf6) != 0 && (cdb[1] & 0xe0) != 0)
            sense = ScsiSense.InvalidField;
        else if (Disk.IsReadOnly)
            sense = ScsiSense.WriteProtected;
        else if (block > Blocks || count > Blocks - block)
            sense = ScsiSense.OutOfRange;
        else if (count == 0 || count > MaximumUnmapBlocks)
            sense = ScsiSense.InvalidField;
        command = new ScsiMediumCommand(BlockOperation.WriteZeroes, (long)block * BlockSize, (long)count * BlockSize, false, (cdb[1] & unmap) != 0);
        return true;
    }

    private int Inquiry(ReadOnlySpan<byte> cdb, Span<byte> reply, ref ScsiSense sense)
    {
        const byte cdDrive = 5;
        byte type = IsCd ? cdDrive : (byte)0;
        reply[0] = type;
        if ((cdb[1] & 1) != 0)
            return VitalProductData((VitalPage)cdb[2], reply, ref sense);
        if (cdb[2] != 0)
        {
            sense = ScsiSense.InvalidField;
            return 0;
        }
        const byte spc4 = 6;
        const byte hierarchical = 0x10;
        const byte removable = 0x80;
        const byte commandQueue = 2;
        reply[1] = IsCd ? removable : (byte)0;
        reply[2] = spc4;
        reply[3] = hierarchical | 2;
        reply[4] = 36 - 5;
        reply[7] = hierarchical | commandQueue;
        Encoding.ASCII.GetBytes("KVASIR  ", reply[8..]);
        Encoding.ASCII.GetBytes(IsCd ? "CD-ROM          " : "HARDDISK        ", reply[16..]);
        Encoding.ASCII.GetBytes("1.0 ", reply[32..]);
        return 36;
    }

    private int VitalProductData(VitalPage page, Span<byte> reply, ref ScsiSense sense)
    {
        reply[1] = (byte)page;
        int length;
        switch (page)
        {
            case VitalPage.Supported:
                byte[] pages = IsCd ? [0x00, 0x80, 0x83] : [0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2];
                pages.CopyTo(reply[4..]);
                length = pages.Length;
                break;
            case VitalPage.SerialNumber:
                length = Encoding.ASCII.GetBytes(Disk.Settings.Serial, reply[4..]);
                break;
            case VitalPage.Identification:
                // One designator: vendor specific ASCII, for the unit.
                string text = Disk.Settings.Serial.Length > 0 ? Disk.Settings.Serial : Disk.Settings.Name;
                reply[4] = 2;
                const int longest = 64;
                int size = Encoding.ASCII.GetBytes(text.AsSpan(0, Math.Min(text.Length, longest)), reply[8..]);
                reply[7] = (byte)size;
                length = 4 + size;
                break;
            case VitalPage.BlockLimits when !IsCd:
                const uint maximumTransfer = 1 << 16;
                reply[5] = 0;
                BinaryPrimitives.WriteUInt16BigEndian(reply[6..], (ushort)Math.Max(1, Disk.Settings.PhysicalBlock / BlockSize));
                BinaryPrimitives.WriteUInt32BigEndian(reply[8..], maximumTransfer);
                if (!Disk.IsReadOnly)
                {
                    BinaryPrimitives.WriteUInt32BigEndian(reply[20..], MaximumUnmapBlocks);
                    BinaryPrimitives.WriteUInt32BigEndian(reply[24..], MaximumUnmapRanges);
                    BinaryPrimitives.WriteUInt32BigEndian(reply[28..], (uint)Math.Max(1, Disk.Settings.PhysicalBlock / BlockSize));
                    BinaryPrimitives.WriteUInt64BigEndian(reply[36..], MaximumUnmapBlocks);
                }
                length = 0x3c;
                break;
            case VitalPage.BlockCharacteristics when !IsCd:
                // Not rotating.
                BinaryPrimitives.WriteUInt16BigEndian(reply[4..], 1);
                length = 0x3c;
                break;
            case VitalPage.LogicalProvisioning when !IsCd:
                // UNMAP and WRITE SAME(16) with UNMAP; thin.
                reply[5] = Disk.Backend.CanDiscard ? (byte)0xc0 : (byte)0;
                reply[6] = Disk.Backend.CanDiscard ? (byte)2 : (byte)0;
                length = 4;
                break;
            default:
                sense = ScsiSense.InvalidField;
                return 0;
        }
        BinaryPrimitives.WriteUInt16BigEndian(reply[2..], (ushort)length);
        return 4 + length;
    }

    private int ModeSense(ReadOnlySpan<byte> cdb, Span<byte> reply, ref ScsiSense sense)
    {
        bool wide = cdb[0] == (byte)ScsiOperation.ModeSense10;
        ModePage page = (ModePage)(cdb[2] & 0x3f);
        bool changeable = cdb[2] >> 6 == 1;
        int header = wide ? 8 : 4;
        int at = header;
        at += Page(ModePage.ReadErrorRecovery, page, reply[at..], IsCd, changeable, 10, _ => { });
        at += Page(ModePage.Caching, page, reply[at..], !IsCd, changeable, 18, body => body[0] = Disk.Backend.WriteCache ? (byte)4 : (byte)0);
        at += Page(ModePage.Control, page, reply[at..], !IsCd, changeable, 10, _ => { });
        at += Page(ModePage.CdCapabilities, page, reply[at..], IsCd, changeable, 20, body =>
        {
            body[0] = 0x3b;
            body[2] = 0x71;
            body[3] = 0x60;
            body[4] = 0x29;
        });
        if (at == header && page != ModePage.All)
        {
            sense = ScsiSense.InvalidField;
            return 0;
        }
        const byte writeProtected = 0x80;
        const byte forceUnitAccess = 0x10;
        byte parameters = (byte)((Disk.IsReadOnly ? writeProtected : 0) | (IsCd ? 0 : forceUnitAccess));
        if (wide)
        {
            BinaryPrimitives.WriteUInt16BigEndian(reply, (ushort)(at - 2));
            reply[3] = parameters;
        }
        else
        {
            reply[0] = (byte)(at - 1);
            reply[2] = parameters;
        }
        return at;
    }

    private delegate void Fill(Span<byte> body);

    private static int Page(ModePage page, ModePage wanted, Span<byte> reply, bool exists, bool changeable, byte length, Fill fill)
    {
        if (!exists || (wanted != page && wanted != ModePage.All))
            return 0;
        reply[0] = (byte)page;
        reply[1] = length;
        if (!changeable)
            fill(reply[2..]);
        return 2 + length;
    }

    private int ReadCapacity16(Span<byte> reply)
    {
        BinaryPrimitives.WriteUInt64BigEndian(reply, Blocks - 1);
        BinaryPrimitives.WriteInt32BigEndian(reply[8..], BlockSize);
        reply[13] = (byte)System.Numerics.BitOperations.Log2((uint)Math.Max(1, Disk.Settings.PhysicalBlock / BlockSize));
        const byte thin = 0x80;
        const byte readsZeros = 0x40;
        if (!IsCd && Disk.Backend.CanDiscard)
            reply[14] = thin | readsZeros;
        return 32;
    }

    private int Verify(ReadOnlySpan<byte> cdb, ref ScsiSense sense)
    {
        bool wide = cdb[0] == (byte)ScsiOperation.Verify16;
        ulong block = wide ? BinaryPrimitives.ReadUInt64BigEndian(cdb[2..]) : BinaryPrimitives.ReadUInt32BigEndian(cdb[2..]);
        uint count = wide ? BinaryPrimitives.ReadUInt32BigEndian(cdb[10..]) : BinaryPrimitives.ReadUInt16BigEndian(cdb[7..]);
        // Comparing with data of the initiator's is not offered.
        if ((cdb[1] & 6) != 0)
            sense = ScsiSense.InvalidField;
        else if (block > Blocks || count > Blocks - block)
            sense = ScsiSense.OutOfRange;
        return 0;
    }

    /// <summary>One track of data (MMC-6, 6.25).</summary>
    private int ReadToc(ReadOnlySpan<byte> cdb, Span<byte> reply, ref ScsiSense sense)
    {
        bool minutes = (cdb[1] & 2) != 0;
        int format = cdb[2] & 0xf;
        const byte data = 0x14;
        const byte leadOut = 0xaa;
        void Address(Span<byte> at, ulong block)
        {
            if (!minutes)
            {
                BinaryPrimitives.WriteUInt32BigEndian(at, (uint)block);
                return;
            }
            ulong frames = block + 150;
            at[1] = (byte)(frames / 75 / 60);
            at[2] = (byte)(frames / 75 % 60);
            at[3] = (byte)(frames % 75);
        }

        reply[2] = 1;
        reply[3] = 1;
        switch (format)
        {
            case 0:
                reply[5] = data;
                reply[6] = 1;
                Address(reply[8..], 0);
                reply[13] = data;
                reply[14] = leadOut;
                Address(reply[16..], Blocks);
                BinaryPrimitives.WriteUInt16BigEndian(reply, 18);
                return 20;
            case 1:
                reply[5] = data;
                reply[6] = 1;
                BinaryPrimitives.WriteUInt16BigEndian(reply, 10);
                return 12;
            default:
                sense = ScsiSense.InvalidField;
                return 0;
        }
    }

    private static int EventStatus(ReadOnlySpan<byte> cdb, Span<byte> reply, ref ScsiSense sense)
    {
        const byte polled = 1;
        const byte mediaClass = 4;
        if ((cdb[1] & polled) == 0)
        {
            sense = ScsiSense.InvalidField;
            return 0;
        }
        reply[3] = 1 << mediaClass;
        if ((cdb[4] & 1 << mediaClass) == 0)
        {
            BinaryPrimitives.WriteUInt16BigEndian(reply, 2);
            reply[2] = 0x80;
            return 4;
        }
        BinaryPrimitives.WriteUInt16BigEndian(reply, 6);
        reply[2] = mediaClass;
        const byte present = 2;
        reply[5] = present;
        return 8;
    }
}
