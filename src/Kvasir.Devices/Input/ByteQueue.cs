using System;
using System.Runtime.CompilerServices;

namespace Kvasir.Devices.Input;

/// <summary>A bounded first-in, first-out queue of bytes that is plain state.</summary>
public record struct ByteQueue
{
    public const int Capacity = 64;

    [InlineArray(Capacity)]
    public struct Bytes : IEquatable<Bytes>
    {
        private byte _first;

        public readonly bool Equals(Bytes other) => ((ReadOnlySpan<byte>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Bytes other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[Capacity - 1]);

        public static bool operator ==(Bytes a, Bytes b) => a.Equals(b);

        public static bool operator !=(Bytes a, Bytes b) => !a.Equals(b);
    }

    public Bytes Items;
    public byte First;
    public byte Count;

    public readonly int Room => Capacity - Count;

    /// <returns>False where it is full.</returns>
    public bool TryPush(byte value)
    {
        if (Count >= Capacity)
            return false;
        Items[(First + Count) % Capacity] = value;
        Count++;
        return true;
    }

    /// <returns>False where it is empty.</returns>
    public bool TryPop(out byte value)
    {
        value = 0;
        if (Count == 0)
            return false;
        value = Items[First];
        First = (byte)((First + 1) % Capacity);
        Count--;
        return true;
    }

    public void Clear() => this = default;
}
