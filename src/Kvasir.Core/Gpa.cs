using System.Globalization;

namespace Kvasir.Core;

/// <summary>A guest-physical address.</summary>
public readonly record struct Gpa(ulong Value)
{
    public static Gpa operator +(Gpa a, ulong offset) => new(a.Value + offset);

    public static ulong operator -(Gpa a, Gpa b) => a.Value - b.Value;

    public override string ToString() => "0x" + Value.ToString("x", CultureInfo.InvariantCulture);
}
