namespace Kvasir.Core;

/// <summary>
/// A part whose guest-visible state can be taken out and put back: reset, snapshots, migration and fork all use it. Timers and interrupt
/// levels are not in the state; <see cref="Restore"/> derives them again.
/// </summary>
/// <typeparam name="TState">A record struct with all of the guest-visible state.</typeparam>
public interface IStateful<TState>
    where TState : struct
{
    TState Save();

    void Restore(in TState state);
}

/// <summary>A part that the machine's reset line reaches.</summary>
public interface IResettable
{
    void Reset();
}

/// <summary>A part with threads of its own, which stand while the VM is paused.</summary>
public interface IPausable
{
    /// <summary>Waits until nothing of it is under way any more, and lets nothing new begin. All vCPUs stand. Not on one of its own threads.</summary>
    void Pause();

    /// <summary>Lets it go on with what waits.</summary>
    void Resume();
}
