using System;

namespace Kvasir.Core;

/// <summary>One interrupt wire from a device to whatever listens. Levels, not edges: an edge is a rise. Any thread may set it.</summary>
public interface IIrqLine
{
    void Set(bool asserted);
}

/// <summary>Where a device posts message-signalled interrupts (Intel SDM vol. 3, "Message Signalled Interrupts").</summary>
public interface IMsiSink
{
    void Send(ulong address, uint data);
}

/// <summary>Interrupt lines made from other things.</summary>
public static class IrqLine
{
    /// <summary>A wire that leads nowhere.</summary>
    public static IIrqLine None { get; } = new Unconnected();

    /// <summary>A wire that calls <paramref name="set"/> with each level given to it.</summary>
    public static IIrqLine From(Action<bool> set) => new Calling(set);

    /// <summary>A rise and a fall.</summary>
    public static void Pulse(this IIrqLine line)
    {
        line.Set(true);
        line.Set(false);
    }

    private sealed class Unconnected : IIrqLine
    {
        public void Set(bool asserted)
        {
        }
    }

    private sealed class Calling(Action<bool> set) : IIrqLine
    {
        public void Set(bool asserted) => set(asserted);
    }
}
