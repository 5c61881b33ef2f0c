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
