using Kvasir.Cpu;

namespace Kvasir.Machine;

/// <summary>Chooses what executes a VM.</summary>
public static class Accelerators
{
    /// <exception cref="MachineException">The processor model is not known, or a feature cannot be switched.</exception>
    public static ProcessorSource Select(VmConfiguration configuration)
    {
        CpuModel model = Model(configuration.Cpu);
        return (memory, ports, mmio, clock) => new SoftwareProcessors(model, memory, ports, mmio, clock);
    }

    private static CpuModel Model(CpuSelection selection)
    {
        if (selection.Model is not ("host" or "max"))
            throw new MachineException($"there is no processor model '{selection.Model}'; there are host and max");
        if (selection.Added.Count + selection.Removed.Count > 0)
            throw new MachineException("processor features cannot be switched one by one yet; give --cpu host or --cpu max");
        return new CpuModel();
    }
}
