namespace Kvasir.Cpu;

/// <summary>
/// Where the guest's arithmetic flags are while a block is compiled: in the host's RFLAGS, deferred in memory, or to be had again from registers that hold
/// operands or a result still.
/// </summary>
internal struct FlagTracker
{
    /// <summary>The host's RFLAGS hold them.</summary>
    public bool Host;

    /// <summary>Memory holds them, in a form that <see cref="VcpuBlock.FlagKind"/> tells.</summary>
    public bool Memory;

    /// <summary>Kind of a recipe over registers; None: there is none.</summary>
    public FlagKind Kind;

    /// <summary>TEST rather than the result of a logical operation: both operands count.</summary>
    public bool IsTest;

    /// <summary>Width in bytes.</summary>
    public int Width;

    /// <summary>Guest register A, and B where it is one (-1: <see cref="Immediate"/>).</summary>
    public int A;
    public int B;
    public int Immediate;

    public readonly bool HasRecipe => Kind != FlagKind.None;

    /// <summary>Whether a write to the guest registers of a mask spoils the recipe.</summary>
    public readonly bool DependsOn(uint registers) => HasRecipe && ((registers >> A & 1) != 0 || (B >= 0 && (registers >> B & 1) != 0));

    public void Forget()
    {
        Host = false;
        Memory = false;
        Kind = FlagKind.None;
    }
}
