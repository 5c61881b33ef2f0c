namespace Kvasir.Machine;

/// <summary>Where a VM is in its life.</summary>
public enum VmState
{
    /// <summary>Built; no instruction was executed yet.</summary>
    Created,
    Running,
    Paused,
    Finished,
}

/// <summary>What a monitor, a signal or an API asks of a VM. Any thread may call but a vCPU's; a VM that has finished ignores all of it.</summary>
public interface IMachineControl
{
    VmState State { get; }

    int VcpuCount { get; }

    /// <summary>The VM's devices; null where there are none to ask for.</summary>
    IDeviceControl? Devices => null;

    /// <summary>Stops guest time and all vCPUs, and comes back when they stand.</summary>
    void Pause();

    void Resume();

    /// <summary>Pulls the reset line, and comes back when the machine stands at its first instruction again. A paused VM stays paused.</summary>
    void Reset();

    /// <summary>Asks the guest to shut down; whether it does is the guest's choice.</summary>
    /// <returns>Whether the guest listens for the button at all.</returns>
    bool PressPowerButton();

    /// <summary>Ends the VM now, as if its plug were pulled. Comes back before it has ended.</summary>
    void Stop();
}
