using System;
using System.Buffers.Binary;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.Network;
using Kvasir.Network.Frames;

namespace Kvasir.Devices.Virtio;

/// <summary>What a NIC is made of.</summary>
/// <param name="Mac">Six bytes.</param>
/// <param name="Pairs">Pairs of a receive and a transmit queue, 1 to 32.</param>
/// <param name="Mtu">Told to the driver; 0: nothing is.</param>
/// <param name="QueueSize">Entries of each queue, a power of two.</param>
public sealed record NicSettings(ReadOnlyMemory<byte> Mac, int Pairs = 1, int Mtu = 0, ushort QueueSize = VirtioNet.DefaultQueueSize);

/// <summary>
/// Virtio network device (virtio 1.2, 5.1). Frames move on the back end's threads, both ways; the device's own thread serves the control queue alone.
/// </summary>
public sealed partial class VirtioNet : VirtioDevice, INetworkPeer
{
    public const ushort DefaultQueueSize = 256;
    public const int MaximumPairs = 32;

    private const ushort ControlQueueSize = 64;

    /// <summary>IP's largest packet, in an Ethernet frame with a tag.</summary>
    private const int LargestFrame = 65535 + 18;

    /// <summary>Buffers that one frame may be spread over.</summary>
    private const int MaximumMerged = 128;

    /// <summary>Frames sent in one turn, so that what comes in gets its turn too.</summary>
    private const int TransmitBatch = 256;

    private const int FlowSlots = 256;

    /// <summary>Guest-visible state of the type's own.</summary>
    /// <param name="ActivePairs">Pairs in use.</param>
    /// <param name="Offloads">What the guest takes undone.</param>
    /// <param name="Filter">The frames that it wants.</param>
    /// <param name="Announce">It is asked to make its address known.</param>
    public sealed record NetState(int ActivePairs, NetworkOffloads Offloads, ReceiveFilter.Table Filter, bool Announce) : ModelState;

    // Configuration
    private readonly NicSettings _settings;

    // Wiring
    private readonly INetworkBackend _backend;
    private readonly Pair[] _pairs;

    // State
    private readonly ReceiveFilter _filter = new();
    private readonly byte[] _flows = new byte[FlowSlots];
    private readonly object _linkLock = new();
    private volatile int _activePairs = 1;
    private volatile NetworkOffloads _offloads;
    private bool _cableIn = true;
    private bool _announce;

    /// <param name="backend">Whoever made it disposes it, before this device.</param>
    public VirtioNet(string name, GuestMemory memory, INetworkBackend backend, NicSettings settings)
        : base(VirtioType.Net, name, memory, Sizes(settings), (int)Config.Size)
    {
        _backend = backend;
        _settings = settings;
        _pairs = new Pair[settings.Pairs];
        for (int index = 0; index < _pairs.Length; index++)
            _pairs[index] = new Pair(Queues[2 * index], Queues[2 * index + 1]);
        Span<byte> config = stackalloc byte[(int)Config.Size];
        settings.Mac.Span.CopyTo(config);
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.Status..], (ushort)(backend.LinkUp ? LinkUp : 0));
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.MaximumPairs..], (ushort)settings.Pairs);
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.Mtu..], (ushort)settings.Mtu);
        SetConfig(0, config);
        ResetFilter();
    }

    public INetworkBackend Backend => _backend;

    public ReadOnlyMemory<byte> Mac => _settings.Mac;

    /// <summary>Whether the guest is told of a link.</summary>
    public bool HasLink => _cableIn && _backend.LinkUp;

    /// <summary>The type's own state.</summary>
    public NetState Net => new(_activePairs, _offloads, _filter.Current, _announce);

    /// <summary>Frames from outside that the filter kept away, or that no buffer of the guest was large enough for.</summary>
    public long Filtered { get; private set; }

    protected override ulong DeviceFeatures
    {
        get
        {
            Feature features = Feature.Mac | Feature.MergedBuffers | Feature.Status | Feature.ControlQueue | Feature.ControlReceive | Feature.ControlVlan
                | Feature.ControlReceiveExtra | Feature.GuestAnnounce | Feature.ControlMacAddress;
            if (_settings.Mtu != 0)
                features |= Feature.Mtu;
            if (_pairs.Length > 1)
                features |= Feature.MultiQueue;
            NetworkOffloads sends = _backend.SendOffloads;
            features |= Pick(sends, NetworkOffloads.Checksum, Feature.Checksum) | Pick(sends, NetworkOffloads.Tso4, Feature.HostTso4)
                | Pick(sends, NetworkOffloads.Tso6, Feature.HostTso6) | Pick(sends, NetworkOffloads.TsoEcn, Feature.HostEcn);
            NetworkOffloads takes = _backend.ReceiveOffloads;
            features |= Pick(takes, NetworkOffloads.Checksum, Feature.GuestChecksum | Feature.ControlGuestOffloads) | Pick(takes, NetworkOffloads.Tso4, Feature.GuestTso4)
                | Pick(takes, NetworkOffloads.Tso6, Feature.GuestTso6) | Pick(takes, NetworkOffloads.TsoEcn, Feature.GuestEcn);
            return (ulong)features;
        }
    }

    private bool Merges => Has(Feature.MergedBuffers);

    /// <summary>Bytes before each frame: without merging, a legacy driver has no count of buffers there.</summary>
    private int HeaderSize => IsLegacyDriver && !Merges ? LegacyHeaderSize : VnetHeader.Size;

    protected override ModelState SaveModel() => Net;

    protected override string? CheckModel(ModelState? model)
    {
        if (model is not NetState { Filter: { } filter } state)
            return "it is not a NIC's";
        if (state.ActivePairs < 1 || state.ActivePairs > _pairs.Length)
            return $"{state.ActivePairs} pairs of queues are in use, and there are {_pairs.Length}";
        if ((state.Offloads & ~_backend.ReceiveOffloads) != 0)
            return $"the guest takes what its network does not offer: {state.Offloads & ~_backend.ReceiveOffloads}";
        return filter.IsSound ? null : "its filter for frames is damaged";
    }

    protected override void RestoreModel(ModelState? model)
    {
        NetState state = (NetState)model!;
        _activePairs = state.ActivePairs;
        _offloads = state.Offloads;
        _filter.Set(state.Filter);
        _backend.SetReceiveOffloads(state.Offloads);
        lock (_linkLock)
        {
            _announce = state.Announce;
            // The link is what it is here.
            KeepConfig((int)Config.Status, LinkStatus());
        }
    }

    /// <summary>Starts to carry frames. Once, before the VM runs.</summary>
    public void Connect() => _backend.Start(this);

    /// <summary>Pulls the cable out, or puts it back.</summary>
    public void SetCable(bool plugged)
    {
        lock (_linkLock)
        {
            _cableIn = plugged;
            ShowLink();
        }
    }

    /// <summary>Asks the guest to make its address known, after the VM moved to another host or came back from a file.</summary>
    public void Announce()
    {
        lock (_linkLock)
        {
            _announce = Has(Feature.GuestAnnounce);
            ShowLink();
        }
    }

    // The back end's side

    public void LinkChanged(bool up)
    {
        lock (_linkLock)
            ShowLink();
    }

    public void Transmit(int queue)
    {
        if ((uint)queue >= (uint)_pairs.Length || !TryHold())
            return;
        try
        {
            if (IsRunning)
                SendAll(queue, _pairs[queue]);
        }
        finally
        {
            Release();
        }
    }

    public bool CanReceive(int queue)
    {
        // A driver that does not run has frames dropped, as a NIC that is off does.
        if (IsPaused)
            return false;
        if (!IsRunning)
            return true;
        int active = _activePairs;
        bool fixedPair = _backend.QueueCount > 1;
        for (int index = fixedPair ? queue % active : 0; index < active; index++)
        {
            Pair pair = _pairs[index];
            if (pair.Receive.HasAvailable)
                return true;
            pair.AwaitsBuffers = true;
            if (pair.Receive.WantNotifications(true))
                return true;
            if (fixedPair)
                break;
        }
        return false;
    }

    public bool Receive(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (!TryHold())
            return !IsPaused;
        try
        {
            if (!IsRunning || !_cableIn)
                return true;
            if (!_filter.Takes(frame))
            {
                Filtered++;
                return true;
            }
            int active = _activePairs;
            int index = _backend.QueueCount > 1 ? queue % active : active == 1 ? 0 : _flows[FlowOf(frame)] % active;
            Pair pair = _pairs[index];
            // Several of the back end's threads may meet here, and the buffers of one frame follow one another.
            lock (pair)
                return Deliver(pair, header, frame);
        }
        finally
        {
            Release();
        }
    }

    // The core's side

    /// <summary>Frames go by the back end's thread.</summary>
    protected override EventFd? Bell(int index) => index == ControlIndex ? base.Bell(index) : index / 2 < _pairs.Length ? _backend.Bell(index / 2) : null;

    protected override void Wake(Virtqueue queue)
    {
        if (queue.Index == ControlIndex)
            base.Wake(queue);
        else if (queue.Index / 2 < _pairs.Length)
            _backend.Kick(queue.Index / 2);
    }

    protected override void Process(Virtqueue queue)
    {
        if (queue.Index == ControlIndex)
            ProcessControl(queue);
    }

    protected override void Started()
    {
        NetworkOffloads offloads = Given(Feature.GuestChecksum, NetworkOffloads.Checksum) | Given(Feature.GuestTso4, NetworkOffloads.Tso4)
            | Given(Feature.GuestTso6, NetworkOffloads.Tso6) | Given(Feature.GuestEcn, NetworkOffloads.TsoEcn);
        _activePairs = 1;
        _offloads = offloads;
        foreach (Pair pair in _pairs)
            pair.AwaitsBuffers = true;
        _backend.SetReceiveOffloads(offloads);
        if (Has(Feature.ControlVlan))
            _filter.Change(table => table with { Vlans = ReceiveFilter.NoVlans() });
    }

    protected override void Stopped()
    {
        _activePairs = 1;
        _offloads = NetworkOffloads.None;
        ResetFilter();
        Array.Clear(_flows);
        _backend.SetReceiveOffloads(NetworkOffloads.None);
    }

    /// <summary>A driver without the control command writes its address here (5.1.4, "legacy interface").</summary>
    protected override bool WritingConfig(int offset, ReadOnlySpan<byte> bytes)
    {
        if (!IsLegacyDriver || offset + bytes.Length > ReceiveFilter.AddressSize)
            return false;
        Span<byte> mac = stackalloc byte[ReceiveFilter.AddressSize];
        for (int index = 0; index < mac.Length; index++)
            mac[index] = ConfigByte(index);
        bytes.CopyTo(mac[offset..]);
        ulong address = ReceiveFilter.ReadAddress(mac);
        _filter.Change(table => table with { Address = address });
        return true;
    }

    // Frames

    private void SendAll(int index, Pair pair)
    {
        Virtqueue queue = pair.Transmit;
        int sent = 0;
        do
        {
            queue.WantNotifications(false);
            while (queue.Pop() is { } element)
            {
                if (!TrySend(index, pair, element))
                {
                    // The back end calls again when it has room: nothing is to be told of until then.
                    queue.Unpop(element);
                    queue.Notify();
                    return;
                }
                queue.Push(element, 0);
                if (++sent < TransmitBatch)
                    continue;
                queue.Notify();
                _backend.Kick(index);
                return;
            }
            queue.Notify();
        }
        while (queue.WantNotifications(true) && !MustStand);
    }

    /// <returns>False where the back end has no room.</returns>
    private bool TrySend(int index, Pair pair, VirtqueueElement element)
    {
        int headerSize = HeaderSize;
        VnetHeader header = default;
        Span<byte> bytes = header.AsWritableBytes();
        long length = element.ReadableLength - headerSize;
        // What is no frame is taken back without a word, as a NIC does with one that it cannot put on the wire.
        if (element.Read(0, bytes[..headerSize]) < headerSize || length is < 14 or > LargestFrame)
            return true;
        header.BufferCount = 0;
        if (!Allowed(ref header))
            return true;
        // Copied once: the guest could change a frame while it is looked at.
        Span<byte> frame = pair.Frame.AsSpan(0, (int)length);
        element.Read(headerSize, frame);
        if (!_cableIn)
            return true;
        if (_pairs.Length > 1)
            _flows[FlowOf(frame)] = (byte)index;
        return _backend.Send(index, header, frame);
    }

    /// <summary>Whether the driver may leave undone what it did.</summary>
    private bool Allowed(ref VnetHeader header)
    {
        if (!Has(Feature.Checksum))
            header.Flags &= ~VnetFlags.NeedsChecksum;
        header.Flags &= VnetFlags.NeedsChecksum;
        if ((header.Segments & VnetSegments.Ecn) != 0 && !Has(Feature.HostEcn))
            return false;
        return header.Kind switch
        {
            VnetSegments.None => true,
            VnetSegments.Tcp4 => Has(Feature.HostTso4) && header.SegmentSize != 0,
            VnetSegments.Tcp6 => Has(Feature.HostTso6) && header.SegmentSize != 0,
            _ => false,
        };
    }

    /// <returns>False where the guest has no buffers.</returns>
    private bool Deliver(Pair pair, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        Virtqueue queue = pair.Receive;
        int headerSize = HeaderSize;
        int need = headerSize + frame.Length;
        int count = Gather(pair, need, out long room);
        if (count == 0)
        {
            if (!queue.IsLive)
                return true;
            // The driver tells of the next ones; those that came in this moment may do.
            pair.AwaitsBuffers = true;
            if (!queue.WantNotifications(true))
                return false;
            count = Gather(pair, need, out room);
            if (count == 0)
                return !queue.IsLive;
        }
        if (pair.AwaitsBuffers)
        {
            pair.AwaitsBuffers = false;
            queue.WantNotifications(false);
        }
        if (room < need || pair.Elements[0].WritableLength < headerSize)
        {
            GiveBack(pair, count);
            Filtered++;
            return true;
        }
        Spread(pair, count, headerSize, header, frame);
        queue.Notify();
        return true;
    }

    /// <summary>Takes buffers for a frame.</summary>
    /// <returns>How many; 0 where there are too few now. One that is too small alone is a buffer that the frame does not fit into.</returns>
    private int Gather(Pair pair, int need, out long room)
    {
        int most = Merges ? MaximumMerged : 1;
        int count = 0;
        room = 0;
        while (room < need && count < most)
        {
            if (pair.Receive.Pop() is not { } element)
            {
                GiveBack(pair, count);
                return 0;
            }
            pair.Elements[count++] = element;
            room += element.WritableLength;
        }
        return count;
    }

    private void Spread(Pair pair, int count, int headerSize, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        Virtqueue queue = pair.Receive;
        VnetHeader told = header;
        told.BufferCount = (ushort)count;
        if ((_offloads & NetworkOffloads.Checksum) == 0)
            told.Flags = VnetFlags.None;
        VirtqueueElement first = pair.Elements[0];
        first.Write(0, told.AsBytes()[..headerSize]);
        int done = first.Write(headerSize, frame);
        queue.Push(first, (uint)(headerSize + done));
        for (int index = 1; index < count; index++)
        {
            int part = pair.Elements[index].Write(0, frame[done..]);
            done += part;
            queue.Push(pair.Elements[index], (uint)part);
        }
    }

    private static void GiveBack(Pair pair, int count)
    {
        for (int index = count - 1; index >= 0; index--)
            pair.Receive.Unpop(pair.Elements[index]);
    }

    /// <summary>A number that is the same for both directions of a connection.</summary>
    private static int FlowOf(ReadOnlySpan<byte> frame)
    {
        const ushort ip4 = 0x0800;
        const ushort ip6 = 0x86dd;
        ushort type = frame.Length < 38 ? (ushort)0 : BinaryPrimitives.ReadUInt16BigEndian(frame[12..]);
        uint mixed;
        if (type == ip4)
        {
            int transport = 14 + (frame[14] & 15) * 4;
            mixed = BinaryPrimitives.ReadUInt32BigEndian(frame[26..]) ^ BinaryPrimitives.ReadUInt32BigEndian(frame[30..]);
            if (frame[23] is 6 or 17 && frame.Length >= transport + 4)
                mixed ^= BinaryPrimitives.ReadUInt16BigEndian(frame[transport..]) ^ (uint)BinaryPrimitives.ReadUInt16BigEndian(frame[(transport + 2)..]);
        }
        else
        {
            if (type != ip6 || frame.Length < 58)
                return 0;
            mixed = 0;
            for (int at = 22; at < 54; at += 4)
                mixed ^= BinaryPrimitives.ReadUInt32BigEndian(frame[at..]);
            mixed ^= BinaryPrimitives.ReadUInt16BigEndian(frame[54..]) ^ (uint)BinaryPrimitives.ReadUInt16BigEndian(frame[56..]);
        }
        return (int)(mixed * 2654435761u >> 24);
    }

    // Control

    /// <summary>Without several pairs the control queue comes right after the first (5.1.2).</summary>
    private int ControlIndex => Has(Feature.MultiQueue) ? 2 * _pairs.Length : 2;

    private bool Has(Feature feature) => Has((ulong)feature);

    private static Feature Pick(NetworkOffloads all, NetworkOffloads one, Feature feature) => all.HasFlag(one) ? feature : Feature.None;

    private NetworkOffloads Given(Feature feature, NetworkOffloads offload) => Has(feature) ? offload : NetworkOffloads.None;

    private void ResetFilter() => _filter.Set(new ReceiveFilter.Table { Address = ReceiveFilter.ReadAddress(_settings.Mac.Span) });

    /// <summary>With the link's lock held.</summary>
    private void ShowLink()
    {
        byte[] status = LinkStatus();
        if (ConfigByte((int)Config.Status) == status[0])
            return;
        SetConfig((int)Config.Status, status);
        ConfigChanged();
    }

    private byte[] LinkStatus() => [(byte)((HasLink ? LinkUp : 0) | (_announce ? AnnounceWanted : 0)), 0];

    private static ushort[] Sizes(NicSettings settings)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(settings.Pairs, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(settings.Pairs, MaximumPairs);
        ushort[] sizes = new ushort[2 * settings.Pairs + 1];
        Array.Fill(sizes, settings.QueueSize);
        sizes[^1] = ControlQueueSize;
        return sizes;
    }

    /// <summary>A pair of queues, and what the thread that carries its frames works with.</summary>
    private sealed class Pair(Virtqueue receive, Virtqueue transmit)
    {
        public Virtqueue Receive { get; } = receive;

        public Virtqueue Transmit { get; } = transmit;

        public byte[] Frame { get; } = new byte[LargestFrame];

        public VirtqueueElement[] Elements { get; } = new VirtqueueElement[MaximumMerged];

        /// <summary>The driver was asked to tell of new receive buffers.</summary>
        public bool AwaitsBuffers { get; set; }
    }
}
