namespace Kvasir.Cpu;

/// <content>What system instructions need of their own.</content>
public sealed unsafe partial class SoftVcpu
{
    /// <summary>Feeds RDRAND and RDSEED.</summary>
    internal RandomSource Random { get; } = new();
}
