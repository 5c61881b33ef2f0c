namespace Kvasir.Core;

/// <summary>What a device may ask of the machine it stands in. Any thread may call; nothing here blocks or throws.</summary>
public interface IPowerControl
{
    /// <summary>The guest switched the machine off (ACPI S5).</summary>
    void PowerOff();

    /// <summary>The guest pulled the reset line (port 92h, CF9h, i8042, ACPI reset register).</summary>
    void Reset();

    /// <summary>The guest ended the VM with an exit code of its own (isa-debug-exit).</summary>
    void Exit(int code);

    /// <summary>A device cannot go on before somebody has seen to the host: the VM is paused, with nothing lost.</summary>
    /// <param name="reason">One line for people.</param>
    void Pause(string reason);

    /// <summary>The guest suspended the machine to memory (ACPI S3).</summary>
    void Suspend();
}
