namespace Kvasir.Cpu;

/// <summary>What CPUID tells the guest, and what follows from it.</summary>
public sealed class CpuModel
{
    /// <summary>The vendor is AMD (or Hygon): instructions that differ between vendors follow AMD's manual.</summary>
    public bool IsAmd { get; }

    /// <summary>Family, model and stepping as leaf 1 gives them in EAX.</summary>
    public uint Signature { get; }
}
