using System;
using System.Buffers;

namespace Kvasir.Linux;

/// <summary>
/// A <see cref="Memory{T}"/> over memory that somebody else owns and that does not move, such as guest RAM. One object serves many
/// blocks after each other: <see cref="Set"/> gives it the next one once nothing uses the last one any more.
/// </summary>
public sealed unsafe class NativeMemoryBlock : MemoryManager<byte>
{
    private byte* _address;
    private int _length;

    public nint Address => (nint)_address;

    public int Length => _length;

    /// <summary>Points at another block.</summary>
    /// <param name="address">Its first byte; must stay mapped while the memory is used.</param>
    /// <param name="length">Its bytes.</param>
    public Memory<byte> Set(nint address, int length)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(length);
        _address = (byte*)address;
        _length = length;
        return CreateMemory(length);
    }

    // SAFETY: whoever called Set promised that these bytes stay mapped.
    public override Span<byte> GetSpan() => new(_address, _length);

    public override MemoryHandle Pin(int elementIndex = 0) => new(_address + elementIndex, default, this);

    public override void Unpin()
    {
    }

    protected override void Dispose(bool disposing)
    {
    }
}
