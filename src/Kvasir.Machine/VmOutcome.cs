namespace Kvasir.Machine;

/// <summary>Why a VM ended.</summary>
public enum VmEnd
{
    /// <summary>The guest switched the machine off.</summary>
    PoweredOff,

    /// <summary>The guest pulled the reset line of a VM that does not reboot.</summary>
    Reset,

    /// <summary>The guest ended the VM with an exit code.</summary>
    GuestExit,

    /// <summary>Somebody on the host ended it.</summary>
    Stopped,

    /// <summary>A vCPU shut down (triple fault).</summary>
    TripleFault,

    /// <summary>The accelerator or the host could not go on.</summary>
    Failure,
}

/// <summary>How a VM ended.</summary>
/// <param name="GuestCode">The guest's exit code; 0 where <see cref="End"/> is not <see cref="VmEnd.GuestExit"/>.</param>
/// <param name="Report">For a person, after a crash or failure; else empty.</param>
public sealed record VmOutcome(VmEnd End, int GuestCode = 0, string Report = "");
