using Kvasir.Kvm;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>What <c>--accel</c> takes, for tests of guests that are small enough for a KVM that emulates kernels, too.</summary>
internal static class EachAccelerator
{
    private static readonly KvmProbe s_probe = KvmProbe.Run();

    public static readonly string[] Names = ["soft", "kvm,kernel-irqchip=off", "kvm,kernel-irqchip=split", "kvm,kernel-irqchip=on"];

    /// <summary>It is a KVM that emulates kernels.</summary>
    public static bool Emulates(string name) => name != "soft" && !s_probe.IsHardware;

    /// <summary>Skips the test where an accelerator is not there.</summary>
    public static void Require(string name) => Assert.SkipWhen(name != "soft" && s_probe.Problem is not null, $"{s_probe.Problem}");
}
