using System;
using System.Buffers.Binary;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <content>What a saved state has of ports and of control messages that wait.</content>
public sealed partial class VirtioConsole
{
    /// <summary>No driver's buffers take more of a message.</summary>
    private const int LongestMessage = 4096;

    /// <param name="Input">Bytes that wait for the guest.</param>
    /// <param name="Open">A program of the guest's has the port open.</param>
    /// <param name="Told">Whether the guest was told that somebody is at the other side; null: it did not come to that.</param>
    public sealed record PortState(byte[] Input, bool Open, bool? Told);

    /// <param name="Control">Messages that wait for the driver's buffers.</param>
    public sealed record ConsoleState(PortState[] Ports, byte[][] Control) : ModelState;

    protected override ModelState SaveModel()
    {
        byte[][] control;
        lock (_lock)
            control = Array.ConvertAll(_control.ToArray(), message => (byte[])message.Clone());
        return new ConsoleState(Array.ConvertAll(_ports, port => port.Save()), control);
    }

    protected override string? CheckModel(ModelState? model)
    {
        if (model is not ConsoleState { Ports: { } ports, Control: { } control })
            return "it is not a console's";
        if (ports.Length != _ports.Length)
            return $"it has {ports.Length} ports, and there are {_ports.Length}";
        foreach (PortState? port in ports)
        {
            if (port?.Input is not { Length: <= InputCapacity })
                return "a port's input is damaged";
        }
        if (control.Length > MostMessages)
            return $"{control.Length} control messages wait";
        foreach (byte[]? message in control)
        {
            if (message is not { Length: >= 8 and <= LongestMessage } || BinaryPrimitives.ReadUInt32LittleEndian(message) >= (uint)_ports.Length)
                return "a control message is damaged";
        }
        return null;
    }

    /// <summary>The terminals are those that are here: the guest hears of another size, and of who came and went.</summary>
    protected override void RestoreModel(ModelState? model)
    {
        ConsoleState state = (ConsoleState)model!;
        lock (_lock)
        {
            _control.Clear();
            foreach (byte[] message in state.Control)
                _control.Enqueue((byte[])message.Clone());
        }
        for (int i = 0; i < _ports.Length; i++)
            _ports[i].Restore(state.Ports[i]);
        Span<byte> size = stackalloc byte[4];
        lock (_lock)
        {
            BinaryPrimitives.WriteUInt16LittleEndian(size, _size.Columns);
            BinaryPrimitives.WriteUInt16LittleEndian(size[2..], _size.Rows);
        }
        uint own = BinaryPrimitives.ReadUInt32LittleEndian(size);
        if (own == ReadConfig((int)Config.Columns, AccessSize.Dword))
            return;
        KeepConfig((int)Config.Columns, size);
        for (int i = 0; MultiPort && i < _ports.Length; i++)
        {
            if (_ports[i].Settings.IsConsole)
                SendResize(i);
        }
    }

    private sealed partial class Port
    {
        public PortState Save()
        {
            lock (_lock)
            {
                byte[] input = new byte[_count];
                for (int i = 0; i < input.Length; i++)
                    input[i] = _input[(_first + i) % InputCapacity];
                return new PortState(input, _open, _told);
            }
        }

        public void Restore(PortState state)
        {
            lock (_lock)
            {
                // What came here before is not of the VM that was saved. What its back end keeps, because there was no room, it gives when there is.
                state.Input.CopyTo(_input, 0);
                _first = 0;
                _count = state.Input.Length;
                _open = state.Open;
                _told = state.Told;
            }
            TellConnected();
        }
    }
}
