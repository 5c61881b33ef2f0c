using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>How a system case ends.</summary>
public enum SystemEnd
{
    /// <summary>The guest wrote to the exit port.</summary>
    Exit,

    /// <summary>The processor shut down.</summary>
    TripleFault,
}

/// <summary>Bytes of guest memory before a case starts.</summary>
public sealed record MemoryImage(ulong Address, byte[] Bytes);

/// <summary>What guest memory must hold at the end: a little-endian value of 1 to 8 bytes.</summary>
public sealed record MemoryExpectation(string What, ulong Address, int Size, ulong Value);

/// <summary>
/// A small guest program with the state it starts from and the end that hardware would give. It is data: any accelerator can run it.
/// </summary>
/// <param name="Name">Says what is tested.</param>
/// <param name="Start">The processor's state before the first instruction.</param>
/// <param name="Memory">Memory before it; everything else is zero.</param>
/// <param name="End">How it ends.</param>
/// <param name="Expected">What memory holds then.</param>
public sealed record SystemCase(string Name, CpuState Start, IReadOnlyList<MemoryImage> Memory, SystemEnd End, IReadOnlyList<MemoryExpectation> Expected)
{
    /// <summary>The port that ends a case.</summary>
    public const ushort ExitPort = 0xf4;

    public override string ToString() => Name;
}
