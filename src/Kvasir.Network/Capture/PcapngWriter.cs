using System;
using System.Buffers.Binary;
using System.IO;
using System.Text;
using System.Threading;

namespace Kvasir.Network.Capture;

/// <summary>Which way a captured frame went, seen from the guest (the epb_flags option's values).</summary>
public enum CaptureDirection
{
    Inbound = 1,
    Outbound = 2,
}

/// <summary>A packet capture file (draft-ietf-opsawg-pcapng, sections 4.1 to 4.3). Any thread.</summary>
public sealed class PcapngWriter : IDisposable
{
    private const uint SectionHeader = 0x0a0d0d0a;
    private const uint ByteOrderMagic = 0x1a2b3c4d;
    private const uint InterfaceDescription = 1;
    private const uint EnhancedPacket = 6;
    private const ushort LinkEthernet = 1;
    private const ushort OptionEnd = 0;
    private const ushort OptionName = 2;
    private const ushort OptionResolution = 9;
    private const ushort OptionFlags = 2;
    private const byte Nanoseconds = 9;
    private const int PacketHead = 28;
    private const int PacketTail = 16;
    private static readonly TimeSpan FlushInterval = TimeSpan.FromSeconds(1);

    private readonly Lock _lock = new();
    private readonly Stream _output;
    private readonly TimeProvider _time;
    private readonly Action<string>? _log;
    private long _lastFlush;
    private bool _broken;
    private bool _disposed;

    /// <param name="output">Owned from here on.</param>
    /// <param name="interfaceName">What readers show.</param>
    /// <param name="log">Told once where the file cannot be written any more.</param>
    /// <param name="time">The host's time.</param>
    public PcapngWriter(Stream output, string interfaceName, Action<string>? log = null, TimeProvider? time = null)
    {
        _output = output;
        _log = log;
        _time = time ?? TimeProvider.System;
        _lastFlush = _time.GetTimestamp();
        WriteHeaders(interfaceName);
    }

    /// <exception cref="NetworkException">The file cannot be made.</exception>
    public static PcapngWriter Create(string path, string interfaceName, Action<string>? log = null)
    {
        try
        {
            return new PcapngWriter(new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.Read, 1 << 16), interfaceName, log);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new NetworkException($"cannot write the packet capture {path}: {e.Message}", e);
        }
    }

    /// <summary>Adds a frame. What cannot be written ends the capture, not the network.</summary>
    public void Write(CaptureDirection direction, ReadOnlySpan<byte> frame)
    {
        Span<byte> head = stackalloc byte[PacketHead];
        Span<byte> tail = stackalloc byte[PacketTail + 4];
        int padding = -frame.Length & 3;
        int total = PacketHead + frame.Length + padding + PacketTail;
        ulong stamp = (ulong)(_time.GetUtcNow() - DateTimeOffset.UnixEpoch).Ticks * 100;
        BinaryPrimitives.WriteUInt32LittleEndian(head, EnhancedPacket);
        BinaryPrimitives.WriteInt32LittleEndian(head[4..], total);
        BinaryPrimitives.WriteUInt32LittleEndian(head[8..], 0);
        BinaryPrimitives.WriteUInt32LittleEndian(head[12..], (uint)(stamp >> 32));
        BinaryPrimitives.WriteUInt32LittleEndian(head[16..], (uint)stamp);
        BinaryPrimitives.WriteInt32LittleEndian(head[20..], frame.Length);
        BinaryPrimitives.WriteInt32LittleEndian(head[24..], frame.Length);
        tail.Clear();
        Span<byte> options = tail[padding..];
        BinaryPrimitives.WriteUInt16LittleEndian(options, OptionFlags);
        BinaryPrimitives.WriteUInt16LittleEndian(options[2..], 4);
        BinaryPrimitives.WriteInt32LittleEndian(options[4..], (int)direction);
        BinaryPrimitives.WriteInt32LittleEndian(options[12..], total);
        lock (_lock)
        {
            if (_broken || _disposed)
                return;
            try
            {
                _output.Write(head);
                _output.Write(frame);
                _output.Write(tail[..(padding + PacketTail)]);
                if (_time.GetElapsedTime(_lastFlush) < FlushInterval)
                    return;
                _output.Flush();
                _lastFlush = _time.GetTimestamp();
            }
            catch (IOException e)
            {
                _broken = true;
                _log?.Invoke($"the packet capture ends here: {e.Message}");
            }
        }
    }

    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
            try
            {
                _output.Dispose();
            }
            catch (IOException e)
            {
                _log?.Invoke($"the packet capture's end is lost: {e.Message}");
            }
        }
    }

    private void WriteHeaders(string interfaceName)
    {
        Span<byte> section = stackalloc byte[28];
        BinaryPrimitives.WriteUInt32LittleEndian(section, SectionHeader);
        BinaryPrimitives.WriteInt32LittleEndian(section[4..], section.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(section[8..], ByteOrderMagic);
        BinaryPrimitives.WriteUInt16LittleEndian(section[12..], 1);
        BinaryPrimitives.WriteUInt16LittleEndian(section[14..], 0);
        BinaryPrimitives.WriteInt64LittleEndian(section[16..], -1);
        BinaryPrimitives.WriteInt32LittleEndian(section[24..], section.Length);
        _output.Write(section);

        byte[] name = Encoding.UTF8.GetBytes(interfaceName);
        int padded = (name.Length + 3) & ~3;
        byte[] description = new byte[16 + 4 + padded + 8 + 4 + 4];
        Span<byte> block = description;
        BinaryPrimitives.WriteUInt32LittleEndian(block, InterfaceDescription);
        BinaryPrimitives.WriteInt32LittleEndian(block[4..], block.Length);
        BinaryPrimitives.WriteUInt16LittleEndian(block[8..], LinkEthernet);
        Span<byte> options = block[16..];
        BinaryPrimitives.WriteUInt16LittleEndian(options, OptionName);
        BinaryPrimitives.WriteUInt16LittleEndian(options[2..], (ushort)name.Length);
        name.CopyTo(options[4..]);
        options = options[(4 + padded)..];
        BinaryPrimitives.WriteUInt16LittleEndian(options, OptionResolution);
        BinaryPrimitives.WriteUInt16LittleEndian(options[2..], 1);
        options[4] = Nanoseconds;
        BinaryPrimitives.WriteUInt16LittleEndian(options[8..], OptionEnd);
        BinaryPrimitives.WriteInt32LittleEndian(block[^4..], block.Length);
        _output.Write(block);
    }
}
