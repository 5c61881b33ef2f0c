using System.Runtime.Intrinsics.X86;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>The processor model of the vCPU under test: the host's.</summary>
internal static class OracleModel
{
    /// <summary>The host's vendor is AMD or Hygon.</summary>
    public static bool HostIsAmd
    {
        get
        {
            (int _, int b, int _, int _) = X86Base.CpuId(0, 0);
            // "Auth" and "Hygo", the first letters of the vendors' names.
            return b is 0x6874_7541 or 0x6f67_7948;
        }
    }

    public static CpuModel Create() => new();
}
