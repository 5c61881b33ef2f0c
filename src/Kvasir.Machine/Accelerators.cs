using Kvasir.Cpu;

namespace Kvasir.Machine;

/// <summary>Chooses what executes a VM.</summary>
public static class Accelerators
{
    /// <exception cref="MachineException">The processor model is not known, or a feature cannot be switched.</exception>
    public static ProcessorSource Select(VmConfiguration configuration)
    {
        CpuModel model;
        try
        {
            model = CpuModel.Parse(configuration.Cpu, configuration.Cpus);
        }
        catch (CpuModelException e)
        {
            throw new MachineException($"--cpu: {e.Message}", e);
        }
        return (memory, ports, mmio, clock) => new SoftwareProcessors(model, memory, ports, mmio, clock);
    }
}
