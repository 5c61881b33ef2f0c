using System;
using System.Threading;

namespace Kvasir.Devices.Virtio;

/// <content>Packed rings (virtio 1.2, 2.8): one ring of descriptors that both sides write, and an event suppression structure each way.</content>
public sealed partial class Virtqueue
{
    private enum Suppression : ushort
    {
        Enable = 0,
        Disable = 1,
        AtDescriptor = 2,
    }

    private bool IsAvailablePacked() => IsAvailable(Volatile.Read(ref At<ushort>(_descriptors.Span, _state.NextAvailable * 16 + 14)), _state.AvailableWrap);

    private static bool IsAvailable(ushort flags, bool wrap) =>
        ((flags & (ushort)DescriptorFlags.Available) != 0) == wrap && ((flags & (ushort)DescriptorFlags.Used) != 0) != wrap;

    private string? PopPacked(VirtqueueElement element, out bool found)
    {
        found = false;
        if (!IsAvailablePacked())
            return null;
        int seen = 0;
        int entries = 0;
        ushort at = _state.NextAvailable;
        bool wrap = _state.AvailableWrap;
        while (true)
        {
            if (++seen > _state.Size || seen > VirtqueueElement.MaximumDescriptors)
                return "a chain is longer than its ring";
            Descriptor descriptor = At<Descriptor>(_descriptors.Span, at * 16);
            DescriptorFlags flags = descriptor.PackedFlags;
            entries++;
            string? fault;
            if ((flags & DescriptorFlags.Indirect) != 0)
            {
                if (!_indirect)
                    return "an indirect descriptor without the feature";
                if (entries > 1 || (flags & DescriptorFlags.Next) != 0)
                    return "an indirect descriptor in a chain";
                fault = AppendIndirect(element, descriptor.Address, descriptor.Length, chained: false, ref seen);
            }
            else
            {
                fault = element.Append(_memory, descriptor.Address, descriptor.Length, (flags & DescriptorFlags.Write) != 0);
            }
            if (fault is not null)
                return fault;
            element.Id = descriptor.PackedId;
            if (++at == _state.Size)
            {
                at = 0;
                wrap = !wrap;
            }
            if ((flags & DescriptorFlags.Next) == 0)
                break;
        }
        element.Entries = entries;
        _state.NextAvailable = at;
        _state.AvailableWrap = wrap;
        if (_eventIndex && _notifying)
            TellPacked(true);
        found = true;
        return null;
    }

    private void RewindPacked(int entries)
    {
        int at = _state.NextAvailable - entries;
        if (at < 0)
        {
            at += _state.Size;
            _state.AvailableWrap = !_state.AvailableWrap;
        }
        _state.NextAvailable = (ushort)at;
    }

    private void PushPacked(ReadOnlySpan<(VirtqueueElement Element, uint Written)> elements)
    {
        Span<byte> ring = _descriptors.Span;
        int first = _state.NextUsed * 16;
        ushort firstFlags = 0;
        foreach (ref readonly (VirtqueueElement Element, uint Written) item in elements)
        {
            int at = _state.NextUsed * 16;
            DescriptorFlags flags = _state.UsedWrap ? DescriptorFlags.Available | DescriptorFlags.Used : DescriptorFlags.None;
            if (item.Written > 0)
                flags |= DescriptorFlags.Write;
            At<uint>(ring, at + 8) = item.Written;
            At<ushort>(ring, at + 12) = item.Element.Id;
            // A driver reads on while descriptors are used: the first one's flags show all of them.
            if (at == first)
            {
                firstFlags = (ushort)flags;
            }
            else
            {
                Volatile.Write(ref At<ushort>(ring, at + 14), (ushort)flags);
                // Rings are no code.
                _descriptors.Slice(at, 16).NoteOrderedWrite();
            }
            int next = _state.NextUsed + item.Element.Entries;
            if (next >= _state.Size)
            {
                next -= _state.Size;
                _state.UsedWrap = !_state.UsedWrap;
            }
            _state.NextUsed = (ushort)next;
            _unsignalled += item.Element.Entries;
        }
        if (elements.Length == 0)
            return;
        Volatile.Write(ref At<ushort>(ring, first + 14), firstFlags);
        _descriptors.Slice(first, 16).NoteOrderedWrite();
    }

    private bool WantsPacked()
    {
        Suppression flags = (Suppression)(Volatile.Read(ref At<ushort>(_driver.Span, 2)) & 3);
        if (flags != Suppression.AtDescriptor || !_eventIndex)
            return flags != Suppression.Disable;
        ushort raw = Volatile.Read(ref At<ushort>(_driver.Span, 0));
        ushort wanted = (ushort)(raw & 0x7fff);
        if ((raw >> 15 != 0) != _state.UsedWrap)
            wanted -= _state.Size;
        return Passed(wanted, _state.NextUsed, _unsignalled);
    }

    private void TellPacked(bool wanted)
    {
        Span<byte> device = _used.Span;
        if (!wanted)
        {
            Volatile.Write(ref At<ushort>(device, 2), (ushort)Suppression.Disable);
            return;
        }
        if (_eventIndex)
        {
            Volatile.Write(ref At<ushort>(device, 0), (ushort)(_state.NextAvailable | (_state.AvailableWrap ? 0x8000 : 0)));
            Volatile.Write(ref At<ushort>(device, 2), (ushort)Suppression.AtDescriptor);
            return;
        }
        Volatile.Write(ref At<ushort>(device, 2), (ushort)Suppression.Enable);
    }
}
