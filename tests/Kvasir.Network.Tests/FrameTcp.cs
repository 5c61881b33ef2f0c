using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Net;
using System.Threading;
using Xunit;

namespace Kvasir.Network.Tests;

/// <summary>One TCP connection of a <see cref="FrameGuest"/>: no loss, no reordering, one thread.</summary>
internal sealed class FrameTcp
{
    private const byte Fin = 1;
    private const byte Syn = 2;
    private const byte Reset = 4;
    private const byte Push = 8;
    private const byte Ack = 16;

    private readonly FrameGuest _guest;
    private readonly IPAddress _to;
    private readonly ushort _from;
    private readonly ushort _port;
    private readonly List<byte> _received = [];
    private uint _next = 1000;
    private uint _expected;

    private FrameTcp(FrameGuest guest, IPAddress to, ushort from, ushort port)
    {
        _guest = guest;
        _to = to;
        _from = from;
        _port = port;
    }

    public bool Ended { get; private set; }

    /// <summary>Opens connections; the answers are taken in after all were asked for.</summary>
    public static FrameTcp[] Connect(FrameGuest guest, IPAddress to, ushort firstPort, ushort port, int count)
    {
        FrameTcp[] connections = new FrameTcp[count];
        for (int index = 0; index < count; index++)
        {
            connections[index] = new FrameTcp(guest, to, (ushort)(firstPort + index), port);
            connections[index].Segment(Syn, []);
        }
        foreach (FrameTcp connection in connections)
            connection.FinishConnect();
        return connections;
    }

    public static FrameTcp Connect(FrameGuest guest, IPAddress to, ushort from, ushort port) => Connect(guest, to, from, port, 1)[0];

    /// <summary>Whether the other side refuses or ignores the connection.</summary>
    public static bool IsRefused(FrameGuest guest, IPAddress to, ushort from, ushort port, TimeSpan patience)
    {
        FrameTcp connection = new(guest, to, from, port);
        connection.Segment(Syn, []);
        byte[]? answer = guest.TryExpect(connection.IsMine, patience);
        return answer is null || (answer[47] & Reset) != 0;
    }

    /// <summary>Waits for somebody outside to connect to a port of the guest.</summary>
    public static FrameTcp Accept(FrameGuest guest, ushort port)
    {
        byte[] frame = guest.Expect(
            f => FrameGuest.Type(f) == 0x0800 && f[23] == 6 && BinaryPrimitives.ReadUInt16BigEndian(f.AsSpan(36)) == port && (f[47] & (Syn | Ack)) == Syn, "SYN");
        FrameTcp connection = new(guest, new IPAddress(frame.AsSpan(26, 4)), port, BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(34)));
        connection._expected = BinaryPrimitives.ReadUInt32BigEndian(frame.AsSpan(38)) + 1;
        connection.Segment(Syn | Ack, []);
        connection._next++;
        return connection;
    }

    public void Send(byte[] data, bool leaveChecksum = false, ushort segmentSize = 0)
    {
        Segment(Push | Ack, data, leaveChecksum, segmentSize);
        _next += (uint)data.Length;
    }

    /// <summary>Receives at least so many bytes, acknowledging each segment.</summary>
    public byte[] Receive(int count)
    {
        while (_received.Count < count && !Ended)
            Take();
        byte[] result = [.. _received];
        _received.Clear();
        return result;
    }

    public void Close()
    {
        Segment(Fin | Ack, []);
        _next++;
        while (!Ended)
            Take();
    }

    private void Take()
    {
        byte[] frame = _guest.Expect(IsMine, $"segment for port {_from}");
        FrameGuest.AssertChecksums(frame);
        int offset = 34 + (frame[46] >> 4) * 4;
        int end = 14 + BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(16));
        uint sequence = BinaryPrimitives.ReadUInt32BigEndian(frame.AsSpan(38));
        Assert.False((frame[47] & Reset) != 0, "the connection was reset");
        if (sequence == _expected)
        {
            _received.AddRange(frame[offset..end]);
            _expected += (uint)(end - offset);
            if ((frame[47] & Fin) != 0)
            {
                _expected++;
                Ended = true;
            }
        }
        if (end > offset || (frame[47] & Fin) != 0)
            Segment(Ack, []);
    }

    private void FinishConnect()
    {
        byte[] answer = _guest.Expect(IsMine, $"SYN+ACK for port {_from}");
        FrameGuest.AssertChecksums(answer);
        Assert.Equal(Syn | Ack, answer[47] & (Syn | Ack | Reset));
        _expected = BinaryPrimitives.ReadUInt32BigEndian(answer.AsSpan(38)) + 1;
        _next++;
        Segment(Ack, []);
    }

    private bool IsMine(byte[] f) => FrameGuest.Type(f) == 0x0800 && f[23] == 6 && f.AsSpan(26, 4).SequenceEqual(_to.GetAddressBytes())
        && BinaryPrimitives.ReadUInt16BigEndian(f.AsSpan(34)) == _port && BinaryPrimitives.ReadUInt16BigEndian(f.AsSpan(36)) == _from;

    private void Segment(byte flags, byte[] data, bool leaveChecksum = false, ushort segmentSize = 0)
    {
        byte[] segment = new byte[20 + data.Length];
        BinaryPrimitives.WriteUInt16BigEndian(segment, _from);
        BinaryPrimitives.WriteUInt16BigEndian(segment.AsSpan(2), _port);
        BinaryPrimitives.WriteUInt32BigEndian(segment.AsSpan(4), _next);
        BinaryPrimitives.WriteUInt32BigEndian(segment.AsSpan(8), (flags & Ack) != 0 ? _expected : 0);
        segment[12] = 5 << 4;
        segment[13] = flags;
        BinaryPrimitives.WriteUInt16BigEndian(segment.AsSpan(14), 0xffff);
        data.CopyTo(segment, 20);
        _guest.SendTransport(_to, 6, segment, 16, leaveChecksum, segmentSize);
    }
}
