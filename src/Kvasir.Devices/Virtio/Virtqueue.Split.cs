using System;
using System.Threading;

namespace Kvasir.Devices.Virtio;

/// <content>Split rings (virtio 1.2, 2.7): a descriptor table, a ring of available heads written by the driver, a ring of used ones written by the device.</content>
public sealed partial class Virtqueue
{
    private const ushort NoInterrupt = 1;
    private const ushort NoNotify = 1;

    private ushort AvailableIndex => Volatile.Read(ref At<ushort>(_driver.Span, 2));

    private string? PopSplit(VirtqueueElement element, out bool found)
    {
        found = false;
        ushort size = _state.Size;
        ushort waiting = (ushort)(AvailableIndex - _state.NextAvailable);
        if (waiting == 0)
            return null;
        if (waiting > size)
            return $"the available index is {waiting} ahead";
        ushort head = At<ushort>(_driver.Span, 4 + 2 * (_state.NextAvailable & (size - 1)));
        string? fault = ReadChain(element, head);
        if (fault is not null)
            return fault;
        element.Id = head;
        _state.NextAvailable++;
        if (_eventIndex && _notifying)
            TellSplit(true);
        found = true;
        return null;
    }

    private string? ReadChain(VirtqueueElement element, ushort head)
    {
        ushort size = _state.Size;
        Span<byte> table = _descriptors.Span;
        int seen = 0;
        uint at = head;
        while (true)
        {
            if (at >= size)
                return $"descriptor {at} is outside the table";
            if (++seen > size)
                return "a chain of descriptors is a loop";
            Descriptor descriptor = At<Descriptor>(table, (int)at * 16);
            DescriptorFlags flags = descriptor.SplitFlags;
            if ((flags & DescriptorFlags.Indirect) != 0)
            {
                if (!_indirect)
                    return "an indirect descriptor without the feature";
                if ((flags & DescriptorFlags.Next) != 0)
                    return "an indirect descriptor with a next";
                return AppendIndirect(element, descriptor.Address, descriptor.Length, chained: true, ref seen);
            }
            if (seen > VirtqueueElement.MaximumDescriptors)
                return "a chain is longer than a device has to take";
            string? fault = element.Append(_memory, descriptor.Address, descriptor.Length, (flags & DescriptorFlags.Write) != 0);
            if (fault is not null)
                return fault;
            if ((flags & DescriptorFlags.Next) == 0)
                return null;
            at = descriptor.Next;
        }
    }

    private void PushSplit(ReadOnlySpan<(VirtqueueElement Element, uint Written)> elements)
    {
        Span<byte> used = _used.Span;
        int mask = _state.Size - 1;
        int first = _state.NextUsed & mask;
        foreach (ref readonly (VirtqueueElement Element, uint Written) item in elements)
        {
            int at = 4 + 8 * (_state.NextUsed & mask);
            At<uint>(used, at) = item.Element.Id;
            At<uint>(used, at + 4) = item.Written;
            _state.NextUsed++;
        }
        // Rings are no code.
        int straight = Math.Min(elements.Length, _state.Size - first);
        _used.Slice(4 + 8 * first, 8 * straight).NoteOrderedWrite();
        if (straight < elements.Length)
            _used.Slice(4, 8 * Math.Min(elements.Length - straight, _state.Size)).NoteOrderedWrite();
        Volatile.Write(ref At<ushort>(used, 2), _state.NextUsed);
        _used.Slice(0, 4).NoteOrderedWrite();
        _unsignalled += elements.Length;
    }

    private bool WantsSplit()
    {
        if (!_eventIndex)
            return (Volatile.Read(ref At<ushort>(_driver.Span, 0)) & NoInterrupt) == 0;
        ushort wanted = Volatile.Read(ref At<ushort>(_driver.Span, 4 + 2 * _state.Size));
        return Passed(wanted, _state.NextUsed, _unsignalled);
    }

    private void TellSplit(bool wanted)
    {
        if (_eventIndex)
        {
            // Without the wish to hear, the event index just stays behind.
            if (wanted)
                Volatile.Write(ref At<ushort>(_used.Span, 4 + 8 * _state.Size), _state.NextAvailable);
            return;
        }
        Volatile.Write(ref At<ushort>(_used.Span, 0), wanted ? (ushort)0 : NoNotify);
    }

    /// <summary>Whether the last <paramref name="count"/> steps to <paramref name="now"/> went past an event index.</summary>
    private static bool Passed(ushort wanted, ushort now, int count) => count > ushort.MaxValue || (ushort)(now - wanted - 1) < (ushort)count;
}
