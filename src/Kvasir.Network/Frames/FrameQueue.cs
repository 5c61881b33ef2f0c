using System;
using System.Buffers.Binary;

namespace Kvasir.Network.Frames;

/// <summary>Frames that wait, in one block of memory made once. One thread.</summary>
internal sealed class FrameQueue(int capacity)
{
    private const int Prefix = 4;
    private const int Wrap = -1;

    private readonly byte[] _bytes = new byte[capacity];
    private int _head;
    private int _tail;

    public bool IsEmpty => Count == 0;

    public int Count { get; private set; }

    /// <returns>False where there is no room.</returns>
    public bool TryAdd(ReadOnlySpan<byte> frame)
    {
        int need = Prefix + frame.Length;
        if (Count == 0)
        {
            _head = 0;
            _tail = 0;
        }
        bool wrapped = Count > 0 && _tail <= _head;
        int room = wrapped ? _head - _tail : _bytes.Length - _tail;
        if (room < need)
        {
            if (wrapped || _head < need)
                return false;
            if (room >= Prefix)
                BinaryPrimitives.WriteInt32LittleEndian(_bytes.AsSpan(_tail), Wrap);
            _tail = 0;
        }
        BinaryPrimitives.WriteInt32LittleEndian(_bytes.AsSpan(_tail), frame.Length);
        frame.CopyTo(_bytes.AsSpan(_tail + Prefix));
        _tail += need;
        Count++;
        return true;
    }

    /// <summary>The first frame.</summary>
    public ReadOnlySpan<byte> Peek()
    {
        if (_bytes.Length - _head < Prefix || BinaryPrimitives.ReadInt32LittleEndian(_bytes.AsSpan(_head)) == Wrap)
            _head = 0;
        return _bytes.AsSpan(_head + Prefix, BinaryPrimitives.ReadInt32LittleEndian(_bytes.AsSpan(_head)));
    }

    public void Remove()
    {
        int length = Peek().Length;
        _head += Prefix + length;
        Count--;
    }
}
