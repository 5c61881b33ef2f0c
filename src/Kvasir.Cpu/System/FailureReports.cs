namespace Kvasir.Cpu;

/// <summary>Reports for a person: what the vCPU was doing when it could not go on.</summary>
public static class FailureReports
{
    public static string TripleFault(SoftVcpu vcpu) => $"vCPU {vcpu.Index}: triple fault";
}
