using System;
using System.Buffers.Binary;

namespace Kvasir.Network.Frames;

/// <summary>
/// Cuts a large TCP segment into frames that a network without offloads takes, as a NIC does it (TSO): headers repeated, lengths, sequence numbers and
/// checksums of each their own. One thread.
/// </summary>
internal ref struct Segmenter
{
    private const int MaximumHeaders = 256;

    private readonly ReadOnlySpan<byte> _frame;
    private readonly FrameLayout _layout;
    private readonly int _headers;
    private readonly int _size;
    private readonly bool _valid;
    private int _at;
    private ushort _index;

    public Segmenter(in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        _frame = frame;
        _layout = FrameLayout.Parse(frame);
        _size = header.SegmentSize;
        if (_layout.Protocol != FrameNumbers.Tcp || _size == 0 || frame.Length < _layout.Transport + 20)
            return;
        if ((header.Kind == VnetSegments.Tcp4) != (_layout.Type == FrameNumbers.Ip4))
            return;
        _headers = _layout.Transport + (frame[_layout.Transport + 12] >> 4) * 4;
        if (_headers < _layout.Transport + 20 || _headers > frame.Length || _headers > MaximumHeaders)
            return;
        _at = _headers;
        _valid = true;
    }

    /// <summary>Whether the frame is what its header says; nothing comes out of one that is not.</summary>
    public readonly bool IsValid => _valid;

    /// <summary>The longest frame that comes out.</summary>
    public readonly int LongestFrame => _headers + Math.Min(_size, _frame.Length - _headers);

    /// <summary>Makes the next frame.</summary>
    /// <returns>Its length, 0 after the last.</returns>
    public int Next(Span<byte> target)
    {
        if (!_valid || (_at >= _frame.Length && _index > 0))
            return 0;
        int payload = Math.Min(_size, _frame.Length - _at);
        bool last = _at + payload >= _frame.Length;
        int length = _headers + payload;
        Span<byte> made = target[..length];
        _frame[.._headers].CopyTo(made);
        _frame.Slice(_at, payload).CopyTo(made[_headers..]);
        Span<byte> tcp = made[_layout.Transport..];
        uint sequence = BinaryPrimitives.ReadUInt32BigEndian(tcp[4..]) + (uint)(_at - _headers);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], sequence);
        const byte fin = 0x01;
        const byte push = 0x08;
        const byte reduced = 0x80;
        if (!last)
            tcp[13] &= unchecked((byte)~(fin | push));
        if (_index > 0)
            tcp[13] &= unchecked((byte)~reduced);
        Finish(made);
        _at += payload;
        _index++;
        return length;
    }

    private readonly void Finish(Span<byte> frame)
    {
        Span<byte> network = frame[_layout.Network..];
        Span<byte> tcp = frame[_layout.Transport..];
        uint pseudo;
        if (_layout.Type == FrameNumbers.Ip4)
        {
            BinaryPrimitives.WriteUInt16BigEndian(network[2..], (ushort)network.Length);
            ushort identity = BinaryPrimitives.ReadUInt16BigEndian(network[4..]);
            BinaryPrimitives.WriteUInt16BigEndian(network[4..], (ushort)(identity + _index));
            network[10] = 0;
            network[11] = 0;
            Span<byte> header = network[..(_layout.Transport - _layout.Network)];
            BinaryPrimitives.WriteUInt16BigEndian(network[10..], InternetChecksum.Compute(header));
            pseudo = InternetChecksum.Sum(network.Slice(12, 8));
        }
        else
        {
            BinaryPrimitives.WriteUInt16BigEndian(network[4..], (ushort)(network.Length - 40));
            pseudo = InternetChecksum.Sum(network.Slice(8, 32));
        }
        tcp[16] = 0;
        tcp[17] = 0;
        BinaryPrimitives.WriteUInt16BigEndian(tcp[16..], InternetChecksum.Compute(tcp, pseudo + FrameNumbers.Tcp + (uint)tcp.Length));
    }
}
