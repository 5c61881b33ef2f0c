namespace Kvasir.X86;

/// <summary>One leaf of CPUID as a table row (Intel SDM vol. 2, CPUID), the form in which a processor model is handed to an accelerator.</summary>
/// <param name="Leaf">EAX on entry.</param>
/// <param name="Subleaf">ECX on entry, where <paramref name="HasSubleaves"/>.</param>
/// <param name="HasSubleaves">The leaf looks at ECX.</param>
public readonly record struct CpuidEntry(uint Leaf, uint Subleaf, bool HasSubleaves, uint Eax, uint Ebx, uint Ecx, uint Edx);
