using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>One region that a function decodes, where its base address register says.</summary>
/// <param name="Number">The register, 0 to 5; a 64-bit one takes the next too.</param>
/// <param name="Size">Bytes, a power of two.</param>
/// <param name="Memory">Answers accesses of the memory kinds.</param>
/// <param name="Ports">Answers accesses of <see cref="PciBarKind.Io"/>; ports are offsets in the region.</param>
/// <param name="MaxSize">The widest access it takes; wider ones are split.</param>
internal sealed record PciBar(int Number, PciBarKind Kind, ulong Size, IMmioDevice? Memory, IPortDevice? Ports, AccessSize MaxSize);

/// <summary>
/// One PCI function: its configuration space with what of it can be written, base address registers, capabilities and interrupts (PCI Local Bus
/// specification 3.0, ch. 6; PCI Express Base specification, ch. 7). A device model derives from it or owns one, adds regions and capabilities
/// while it is built, and then only raises interrupts.
/// </summary>
/// <remarks>Lock order: the device's own lock, then the function's, then interrupt controllers. The memory map is changed with no function's lock held.</remarks>
public class PciFunction : IResettable
{
    /// <summary>Bytes of conventional and of Express configuration space.</summary>
    public const int ConventionalSize = 256;
    public const int ExpressSize = 4096;

    protected const int BarCount = 6;

    private const ulong MiB = 1 << 20;

    /// <summary>A resizable region has at most 2^27 MiB.</summary>
    private const byte LargestChoice = 27;

    /// <summary>All guest-visible state that the function itself holds.</summary>
    public readonly record struct State(byte[] Config, byte[] MsixTable, bool IntxAsserted);

    // Configuration
    private readonly byte[] _initial = new byte[ExpressSize];
    private readonly byte[] _writable = new byte[ExpressSize];
    private readonly byte[] _writeOneToClear = new byte[ExpressSize];
    private readonly PciBar?[] _bars = new PciBar?[BarCount];
    private readonly bool _bridge;
    private int _nextCapability = (int)PciRegister.FirstCapability;
    private int _lastCapability = (int)PciRegister.CapabilityPointer;
    private int _nextExtended = ConventionalSize;
    private int _lastExtended;
    private bool _sealed;
    private PciBar? _resizable;
    private uint _resizableSizes;
    private int _resizeControl;

    // Wiring
    private PciBus? _bus;

    // State
    private readonly Lock _lock = new();
    private readonly byte[] _config = new byte[ExpressSize];
    private bool _intx;
    private bool _intxDriven;

    /// <param name="name">What people know the device by.</param>
    /// <param name="bridge">It has a type 1 header.</param>
    public PciFunction(string name, PciIdentity identity, bool bridge = false)
    {
        Name = name;
        Identity = identity;
        _bridge = bridge;
        Initial16((int)PciRegister.VendorId, identity.Vendor);
        Initial16((int)PciRegister.DeviceId, identity.Device);
        _initial[(int)PciRegister.Revision] = identity.Revision;
        _initial[(int)PciRegister.ClassCode] = (byte)identity.Class;
        Initial16((int)PciRegister.ClassCode + 1, (ushort)(identity.Class >> 8));
        _initial[(int)PciRegister.HeaderType] = bridge ? (byte)1 : (byte)0;
        if (!bridge)
        {
            Initial16((int)PciRegister.SubsystemVendorId, identity.SubsystemVendor);
            Initial16((int)PciRegister.SubsystemId, identity.Subsystem);
        }
        Writable16((int)PciRegister.Command, (ushort)PciCommand.Writable);
        ClearedByOnes16((int)PciRegister.Status, (ushort)PciStatus.Errors);
        _writable[(int)PciRegister.CacheLineSize] = 0xff;
        _writable[(int)PciRegister.InterruptLine] = 0xff;
        _initial.CopyTo(_config, 0);
    }

    public string Name { get; }

    public PciIdentity Identity { get; }

    /// <summary>Where it sits, once it is on a bus.</summary>
    public PciSlot Slot { get; private set; }

    public PciBus? Bus => _bus;

    /// <summary>The MSI-X capability, or null.</summary>
    public Msix? Msix { get; private set; }

    /// <summary>The MSI capability, or null.</summary>
    public Msi? Msi { get; private set; }

    /// <summary>Bytes of its configuration space that are reached; past them it reads as zeros.</summary>
    public int ConfigSize => ConventionalSize < _nextExtended || IsExpress ? ExpressSize : ConventionalSize;

    /// <summary>It has an Express capability.</summary>
    public bool IsExpress { get; private set; }

    /// <summary>The guest lets it write to memory and send message-signalled interrupts.</summary>
    public bool IsBusMaster => (Command & PciCommand.BusMaster) != 0;

    internal bool IsBridge => _bridge;

    internal PciCommand Command => (PciCommand)Get16((int)PciRegister.Command);

    // Building

    /// <summary>Has the function use a pin for legacy interrupts: 1 for INTA.</summary>
    public void UsePin(int pin)
    {
        CheckOpen();
        _initial[(int)PciRegister.InterruptPin] = _config[(int)PciRegister.InterruptPin] = (byte)pin;
    }

    /// <summary>Gives function 0 the bit that has software look for more functions.</summary>
    public void MarkMultifunction()
    {
        _initial[(int)PciRegister.HeaderType] |= 0x80;
        _config[(int)PciRegister.HeaderType] |= 0x80;
    }

    /// <summary>Adds a memory region.</summary>
    public void AddMemoryBar(int number, PciBarKind kind, ulong size, IMmioDevice device, AccessSize maxSize = AccessSize.Dword)
    {
        AddBar(new PciBar(number, kind, Math.Max(size, 16), device, null, maxSize));
    }

    /// <summary>Adds a region of ports; the device sees offsets.</summary>
    public void AddPortBar(int number, int count, IPortDevice device, AccessSize maxSize = AccessSize.Dword) =>
        AddBar(new PciBar(number, PciBarKind.Io, (ulong)Math.Max(count, 4), null, device, maxSize));

    /// <summary>Adds a capability.</summary>
    /// <param name="id">Its ID.</param>
    /// <param name="body">What follows the ID and the next pointer.</param>
    /// <returns>Its offset in configuration space.</returns>
    public int AddCapability(PciCapabilityId id, ReadOnlySpan<byte> body)
    {
        CheckOpen();
        int at = _nextCapability;
        int length = (body.Length + 2 + 3) & ~3;
        if (at + length > ConventionalSize)
            throw new InvalidOperationException($"{Name}: no room for the capability {id}");
        SetInitial(_lastCapability, [(byte)at]);
        SetInitial(at, [(byte)id, 0]);
        SetInitial(at + 2, body);
        _lastCapability = at + 1;
        _nextCapability = at + length;
        Initial16((int)PciRegister.Status, (ushort)(Get16((int)PciRegister.Status) | (ushort)PciStatus.Capabilities));
        _config[(int)PciRegister.Status] = _initial[(int)PciRegister.Status];
        if (id == PciCapabilityId.Express)
            IsExpress = true;
        return at;
    }

    /// <summary>Adds an Express extended capability (PCI Express Base specification, 7.6.3).</summary>
    /// <returns>Its offset.</returns>
    public int AddExtendedCapability(ushort id, byte version, ReadOnlySpan<byte> body)
    {
        CheckOpen();
        int at = _nextExtended;
        uint header = id | (uint)version << 16;
        SetInitial(at, BitConverter.GetBytes(header));
        SetInitial(at + 4, body);
        if (_lastExtended != 0)
        {
            uint last = BitConverter.ToUInt32(_initial, _lastExtended) | (uint)at << 20;
            SetInitial(_lastExtended, BitConverter.GetBytes(last));
        }
        _lastExtended = at;
        _nextExtended = (at + 4 + body.Length + 3) & ~3;
        return at;
    }

    /// <summary>Lets the guest choose a memory region's size (PCI Express Base specification, 7.8.6 "Resizable BAR"). One region of a function.</summary>
    /// <param name="number">The region, which was added with its size after reset.</param>
    /// <param name="sizes">The sizes that there are: bit n for 2^n MiB, up to 512 GiB.</param>
    public void MakeResizable(int number, uint sizes)
    {
        PciBar bar = _bars[number] ?? throw new ArgumentException($"{Name} has no region {number}", nameof(number));
        if (bar.Size < MiB || (sizes >> System.Numerics.BitOperations.Log2(bar.Size / MiB) & 1) == 0)
            throw new ArgumentException("the region's own size is none of those", nameof(sizes));
        byte[] body = new byte[8];
        BitConverter.TryWriteBytes(body, sizes << 4);
        BitConverter.TryWriteBytes(body.AsSpan(4), (uint)number | 1 << 5 | (uint)System.Numerics.BitOperations.Log2(bar.Size / MiB) << 8);
        const ushort id = 0x15;
        _resizable = bar;
        _resizableSizes = sizes;
        _resizeControl = AddExtendedCapability(id, 1, body) + 8;
    }

    /// <summary>Adds MSI-X with its table in a region of its own.</summary>
    public Msix AddMsix(int bar, int vectors)
    {
        Msix = new Msix(this, bar, vectors);
        return Msix;
    }

    /// <summary>Adds MSI.</summary>
    /// <param name="vectors">A power of two up to 32.</param>
    public Msi AddMsi(int vectors = 1)
    {
        Msi = new Msi(this, vectors);
        return Msi;
    }

    /// <summary>Lets bits be written by the guest.</summary>
    public void Writable16(int offset, ushort bits)
    {
        _writable[offset] |= (byte)bits;
        _writable[offset + 1] |= (byte)(bits >> 8);
    }

    /// <inheritdoc cref="Writable16"/>
    public void Writable32(int offset, uint bits)
    {
        Writable16(offset, (ushort)bits);
        Writable16(offset + 2, (ushort)(bits >> 16));
    }

    /// <summary>Lets bits be cleared by writing ones.</summary>
    public void ClearedByOnes16(int offset, ushort bits)
    {
        _writeOneToClear[offset] |= (byte)bits;
        _writeOneToClear[offset + 1] |= (byte)(bits >> 8);
    }

    /// <summary>What bytes hold after reset.</summary>
    public void SetInitial(int offset, ReadOnlySpan<byte> bytes)
    {
        bytes.CopyTo(_initial.AsSpan(offset));
        bytes.CopyTo(_config.AsSpan(offset));
    }

    // Access by the bus

    /// <summary>Reads configuration space; 1, 2 or 4 bytes, naturally aligned.</summary>
    public uint ReadConfig(int offset, AccessSize size)
    {
        if (offset + (int)size > ConfigSize)
            return 0;
        return ReadingConfig(offset, size) ?? Load(offset, (int)size);
    }

    /// <summary>Writes configuration space.</summary>
    public void WriteConfig(int offset, AccessSize size, uint value)
    {
        int bytes = (int)size;
        if (offset + bytes > ConfigSize || WritingConfig(offset, size, value))
            return;
        bool decoding = false;
        lock (_lock)
        {
            for (int i = 0; i < bytes; i++)
            {
                int at = offset + i;
                byte given = (byte)(value >> i * 8);
                byte old = _config[at];
                byte now = (byte)((old & ~_writable[at]) | (given & _writable[at]));
                now &= (byte)~(given & _writeOneToClear[at]);
                _config[at] = now;
                decoding |= now != old && (at is (int)PciRegister.Command or (>= (int)PciRegister.Bar0 and < 0x34));
            }
            DriveIntx();
        }
        if (_resizable is not null && offset < _resizeControl + 4 && offset + bytes > _resizeControl)
            decoding |= Resize((value >> (_resizeControl + 1 - offset) * 8) & 0x3f, offset <= _resizeControl + 1 && offset + bytes > _resizeControl + 1);
        WrittenConfig(offset, bytes);
        Msi?.ConfigWritten(offset, bytes);
        Msix?.ConfigWritten(offset, bytes);
        if (decoding)
            _bus?.MapChanged();
    }

    public virtual void Reset()
    {
        lock (_lock)
        {
            _initial.CopyTo(_config, 0);
            if (_resizable is not null)
                ShowSize(_resizable);
            _intx = false;
            DriveIntx();
        }
        Msix?.Reset();
        Msi?.Reset();
        _bus?.MapChanged();
    }

    public State Save()
    {
        lock (_lock)
            return new State([.. _config], Msix?.SaveTable() ?? [], _intx);
    }

    /// <summary>Puts saved state back.</summary>
    /// <exception cref="StateException">It is not one of such a function, which stays as it was.</exception>
    public void Restore(in State state)
    {
        if (Fault(state) is { } fault)
            throw new StateException($"{Name}: the saved state does not fit: {fault}");
        lock (_lock)
        {
            state.Config.CopyTo(_config, 0);
            if (_resizable is not null)
                ShowSize(_resizable with { Size = MiB << (_config[_resizeControl + 1] & 0x3f) });
            _intx = state.IntxAsserted;
            DriveIntx();
        }
        Msix?.RestoreTable(state.MsixTable);
        Msi?.ConfigWritten(0, ConventionalSize);
        _bus?.MapChanged();
    }

    /// <summary>Looks whether saved state can be this function's.</summary>
    /// <returns>What is wrong with it, or null.</returns>
    private string? Fault(in State state)
    {
        if (state.Config is not { } config || config.Length != _config.Length)
            return $"it has {state.Config?.Length ?? 0} bytes of configuration space";
        if (state.MsixTable is not { } table || table.Length != (Msix?.StateSize ?? 0))
            return "its MSI-X table is of another size";
        // Vendor and device, revision and class, header type.
        foreach ((int offset, int length) in (ReadOnlySpan<(int, int)>)[(0, 4), (8, 4), (0x0e, 1)])
        {
            if (!config.AsSpan(offset, length).SequenceEqual(_initial.AsSpan(offset, length)))
                return "it is another function's";
        }
        if (_resizable is not null && config[_resizeControl + 1] is byte choice && (choice > LargestChoice || (_resizableSizes >> choice & 1) == 0))
            return $"there is no region of 2^{choice} MiB";
        return null;
    }

    // Interrupts

    /// <summary>Drives the legacy interrupt pin. Any thread.</summary>
    public void SetIntx(bool asserted)
    {
        lock (_lock)
        {
            _intx = asserted;
            DriveIntx();
        }
    }

    // For the bus and capabilities

    internal void Attach(PciBus bus, PciSlot slot)
    {
        _sealed = true;
        _bus = bus;
        Slot = slot;
    }

    internal void Detach()
    {
        lock (_lock)
        {
            _intx = false;
            DriveIntx();
        }
        _bus = null;
    }

    internal PciBar? Bar(int number) => _bars[number];

    /// <summary>Where a region stands now.</summary>
    /// <returns>False where it is switched off or has no address.</returns>
    internal bool TryGetBarAddress(PciBar bar, out ulong address)
    {
        int at = (int)PciRegister.Bar0 + bar.Number * 4;
        lock (_lock)
        {
            PciCommand command = (PciCommand)Get16((int)PciRegister.Command);
            if (bar.Kind == PciBarKind.Io)
            {
                address = Load(at, 4) & ~3u & ~(uint)(bar.Size - 1);
                return (command & PciCommand.Io) != 0 && address != 0 && address + bar.Size <= 0x1_0000;
            }
            address = Load(at, 4) & ~0xfu;
            if (bar.Kind != PciBarKind.Memory32)
                address |= (ulong)Load(at + 4, 4) << 32;
            address &= ~(bar.Size - 1);
            return (command & PciCommand.Memory) != 0 && address != 0 && address + bar.Size - 1 >= address;
        }
    }

    /// <summary>Sends a message-signalled interrupt, if the function may.</summary>
    internal void SendMsi(ulong address, uint data)
    {
        if (IsBusMaster)
            _bus?.Msi.Send(address, data);
    }

    /// <summary>The value of a register as it stands.</summary>
    internal uint Load(int offset, int bytes)
    {
        uint value = 0;
        for (int i = 0; i < bytes; i++)
            value |= (uint)_config[offset + i] << i * 8;
        return value;
    }

    /// <summary>Sets a register from the device's side, whatever the guest may write.</summary>
    protected internal void Store(int offset, int bytes, uint value)
    {
        lock (_lock)
        {
            for (int i = 0; i < bytes; i++)
                _config[offset + i] = (byte)(value >> i * 8);
        }
    }

    protected internal ushort Get16(int offset) => (ushort)(_config[offset] | _config[offset + 1] << 8);

    /// <summary>Gives a register's value where it is not what was stored.</summary>
    protected virtual uint? ReadingConfig(int offset, AccessSize size) => null;

    /// <summary>Takes a write in the function's place.</summary>
    /// <returns>Whether it did.</returns>
    protected virtual bool WritingConfig(int offset, AccessSize size, uint value) => false;

    /// <summary>Bytes were written. No lock is held.</summary>
    protected virtual void WrittenConfig(int offset, int bytes)
    {
    }

    private void AddBar(PciBar bar)
    {
        CheckOpen();
        if ((bar.Size & (bar.Size - 1)) != 0)
            throw new ArgumentException($"{bar.Size} bytes are no power of two", nameof(bar));
        _bars[bar.Number] = bar;
        int at = (int)PciRegister.Bar0 + bar.Number * 4;
        byte type = bar.Kind switch
        {
            PciBarKind.Io => 1,
            PciBarKind.Memory64 => 4,
            PciBarKind.Prefetchable64 => 0xc,
            _ => 0,
        };
        SetInitial(at, [type]);
        ulong mask = ~(bar.Size - 1);
        Writable32(at, (uint)mask & (bar.Kind == PciBarKind.Io ? ~3u : ~0xfu));
        if (bar.Kind is PciBarKind.Memory64 or PciBarKind.Prefetchable64)
            Writable32(at + 4, (uint)(mask >> 32));
    }

    /// <summary>With the lock held: the wire and the status bit follow what the device asserts.</summary>
    private void DriveIntx()
    {
        if (_intx)
            _config[(int)PciRegister.Status] |= (byte)PciStatus.Interrupt;
        else
            _config[(int)PciRegister.Status] &= unchecked((byte)~PciStatus.Interrupt);
        bool drive = _intx && ((PciCommand)Get16((int)PciRegister.Command) & PciCommand.InterruptDisable) == 0;
        int pin = _config[(int)PciRegister.InterruptPin];
        if (drive == _intxDriven || pin == 0 || _bus is not { } bus)
            return;
        _intxDriven = drive;
        bus.SetIntx(Slot.Device, pin - 1, drive);
    }

    /// <summary>The guest chose a size for the resizable region.</summary>
    /// <returns>Whether it is another one.</returns>
    private bool Resize(uint choice, bool written)
    {
        PciBar bar = _bars[_resizable!.Number]!;
        if (!written || choice > LargestChoice || (_resizableSizes >> (int)choice & 1) == 0 || bar.Size == MiB << (int)choice)
            return false;
        lock (_lock)
        {
            _config[_resizeControl + 1] = (byte)choice;
            ShowSize(bar with { Size = MiB << (int)choice });
        }
        return true;
    }

    /// <summary>With the lock held: the region's address bits below its size read as zeros.</summary>
    private void ShowSize(PciBar bar)
    {
        _bars[bar.Number] = bar;
        int at = (int)PciRegister.Bar0 + bar.Number * 4;
        int width = bar.Kind == PciBarKind.Memory32 ? 4 : 8;
        for (int i = 0; i < width; i++)
        {
            byte mask = (byte)(~(bar.Size - 1) >> i * 8);
            _writable[at + i] = i == 0 ? (byte)(mask & 0xf0) : mask;
            _config[at + i] &= i == 0 ? (byte)(_writable[at] | 0xf) : mask;
        }
    }

    private void Initial16(int offset, ushort value) => SetInitial(offset, [(byte)value, (byte)(value >> 8)]);

    private void CheckOpen()
    {
        if (_sealed)
            throw new InvalidOperationException($"{Name} is on a bus already");
    }
}
