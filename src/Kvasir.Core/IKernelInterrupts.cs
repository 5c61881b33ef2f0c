namespace Kvasir.Core;

/// <summary>
/// Interrupt controllers that an accelerator has of its own: the local APICs at least. What the board's own controllers would send to local APICs goes there. Any thread.
/// </summary>
public interface IKernelInterrupts
{
    /// <summary>The 8259s, the I/O APIC and the PIT are its own, too: wires lead there, and the guest's accesses do not come to the board's.</summary>
    bool HasWires { get; }

    /// <summary>Who hears of what comes back. Once, before the guest runs.</summary>
    void Connect(IKernelInterruptsClient client);

    /// <summary>A message-signalled interrupt.</summary>
    /// <returns>Whether a local APIC took it.</returns>
    bool Send(ulong address, uint data);

    /// <summary>What an I/O APIC pin sends, so that the end of a level-triggered interrupt comes back. Only without <see cref="HasWires"/>.</summary>
    /// <param name="pin">From 0.</param>
    /// <param name="message">The address and data; null: the pin is masked.</param>
    void SetRoute(int pin, (ulong Address, uint Data)? message);

    /// <summary>The level of an I/O APIC pin. Only with <see cref="HasWires"/>.</summary>
    void SetPin(int pin, bool asserted);

    /// <summary>The level of an 8259 input, 0 to 15. Only with <see cref="HasWires"/>.</summary>
    void SetPicInput(int input, bool asserted);

    /// <summary>
    /// A level-triggered interrupt was ended at a board's local APIC that stood in for one of the accelerator's. Only with <see cref="HasWires"/>.
    /// </summary>
    void EndLevel(byte vector);

    /// <summary>The HPET has, or no longer has, the PIT's interrupt request. Only with <see cref="HasWires"/>.</summary>
    void SetPitReplaced(bool replaced);

    /// <summary>The board's 8259s raise or lower LINT0. Only without <see cref="HasWires"/>.</summary>
    void SetExternal(bool asserted);

    /// <summary>The board's NMI.</summary>
    void Nmi();

    /// <summary>RESET for what is not a processor's: 8259s, I/O APIC, PIT. No vCPU runs.</summary>
    void Reset();
}

/// <summary>The board's side of <see cref="IKernelInterrupts"/>.</summary>
public interface IKernelInterruptsClient
{
    /// <summary>A local APIC ended a level-triggered interrupt.</summary>
    void EndOfInterrupt(byte vector);

    /// <summary>The interrupt acknowledge cycle to the board's 8259s.</summary>
    /// <returns>The vector, or -1.</returns>
    int AcknowledgeExternal();
}
