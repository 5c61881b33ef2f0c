using System;

namespace Kvasir.Block.Nbd;

/// <summary>Numbers of the NBD protocol (the NetworkBlockDevice project's doc/proto.md). All integers are big-endian.</summary>
internal static class NbdProtocol
{
    public const ulong InitMagic = 0x4e42444d41474943;
    public const ulong OptionMagic = 0x49484156454f5054;
    public const ulong ReplyMagic = 0x0003e889045565a9;
    public const uint RequestMagic = 0x25609513;
    public const uint SimpleReplyMagic = 0x67446698;
    public const uint StructuredReplyMagic = 0x668e33ef;

    public const ushort FlagFixedNewstyle = 1;
    public const ushort FlagNoZeroes = 2;

    public const uint OptExportName = 1;
    public const uint OptAbort = 2;
    public const uint OptList = 3;
    public const uint OptStartTls = 5;
    public const uint OptInfo = 6;
    public const uint OptGo = 7;
    public const uint OptStructuredReply = 8;
    public const uint OptListMetaContext = 9;
    public const uint OptSetMetaContext = 10;

    public const uint RepAck = 1;
    public const uint RepServer = 2;
    public const uint RepInfo = 3;
    public const uint RepMetaContext = 4;
    public const uint RepErrorBit = 1u << 31;
    public const uint RepErrUnsupported = RepErrorBit | 1;
    public const uint RepErrPolicy = RepErrorBit | 2;
    public const uint RepErrInvalid = RepErrorBit | 3;
    public const uint RepErrTlsRequired = RepErrorBit | 5;
    public const uint RepErrUnknown = RepErrorBit | 6;
    public const uint RepErrTooBig = RepErrorBit | 9;

    public const ushort InfoExport = 0;
    public const ushort InfoName = 1;
    public const ushort InfoDescription = 2;
    public const ushort InfoBlockSize = 3;

    public const ushort HasFlags = 1 << 0;
    public const ushort ReadOnly = 1 << 1;
    public const ushort SendFlush = 1 << 2;
    public const ushort SendFua = 1 << 3;
    public const ushort SendTrim = 1 << 5;
    public const ushort SendWriteZeroes = 1 << 6;
    public const ushort SendDf = 1 << 7;
    public const ushort CanMultiConn = 1 << 8;
    public const ushort SendCache = 1 << 10;

    public const ushort CmdRead = 0;
    public const ushort CmdWrite = 1;
    public const ushort CmdDisconnect = 2;
    public const ushort CmdFlush = 3;
    public const ushort CmdTrim = 4;
    public const ushort CmdCache = 5;
    public const ushort CmdWriteZeroes = 6;
    public const ushort CmdBlockStatus = 7;

    public const ushort CmdFlagFua = 1 << 0;
    public const ushort CmdFlagNoHole = 1 << 1;
    public const ushort CmdFlagDf = 1 << 2;
    public const ushort CmdFlagReqOne = 1 << 3;

    public const ushort ChunkDone = 1;
    public const ushort ChunkNone = 0;
    public const ushort ChunkOffsetData = 1;
    public const ushort ChunkOffsetHole = 2;
    public const ushort ChunkBlockStatus = 5;
    public const ushort ChunkError = (1 << 15) | 1;
    public const ushort ChunkErrorOffset = (1 << 15) | 2;

    public const uint StateHole = 1;
    public const uint StateZero = 2;

    public const int LargestRequest = 32 << 20;
    public const int LargestOption = 64 << 10;
    public const int LargestAlignment = 64 << 10;
    public const string BaseAllocation = "base:allocation";

    /// <summary>The errno that goes over the wire: the protocol knows only these.</summary>
    public static uint WireError(int errno) => errno switch
    {
        BlockErrno.Perm or BlockErrno.Access or BlockErrno.ReadOnly => 1,
        BlockErrno.NoMemory => 12,
        BlockErrno.Invalid => 22,
        BlockErrno.NoSpace or BlockErrno.FileTooBig => 28,
        BlockErrno.NotSupported => 95,
        _ => 5,
    };
}
