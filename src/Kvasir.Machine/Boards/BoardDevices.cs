using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Threading;
using Kvasir.Block;
using Kvasir.Boot.Firmware;
using Kvasir.Core;
using Kvasir.Devices.Pci;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>The devices of a board by name, and their coming and going while the VM runs.</summary>
internal sealed class BoardDevices(BoardFrame board, int cpus, Action<string> pause) : IDeviceControl
{
    private const int MaximumQueues = 8;

    /// <summary>Milliseconds that a guest's answer about its memory is waited for.</summary>
    private const int LongestStatistics = 500;

    /// <param name="Port">The slot it sits in; null: it is there for good.</param>
    /// <param name="Disk">Its disk, with the path it was opened from.</param>
    /// <param name="Unit">Its unit of the SCSI controller, for a disk there.</param>
    /// <param name="Nic">What it is as a NIC, whose back end is freed before it.</param>
    private sealed record Entry(
        string Name, VirtioDevice Device, PcieRootPort? Port, (OpenDisk Open, string Path)? Disk, IDisposable? Backend, ScsiUnit? Unit = null, NicConnection? Nic = null);

    private VirtioScsi? _scsi;
    private VirtioBalloon? _balloon;
    private VirtioConsole? _console;

    /// <summary>Where the controller hangs, as firmware names it.</summary>
    private string? _scsiPath;

    /// <summary>Disks that were there at the start, as firmware names them.</summary>
    private readonly List<(int Index, BootChoice Choice)> _bootable = [];

    private readonly Lock _lock = new();
    private readonly List<Entry> _entries = [];

    /// <summary>Those whose slots are empty already and that are being freed: their names and files are still in use.</summary>
    private readonly HashSet<Entry> _leaving = [];

    public IReadOnlyList<DiskStatus> Disks
    {
        get
        {
            lock (_lock)
            {
                return [.. _entries.Where(entry => entry.Disk is not null).Select(entry =>
                {
                    Disk disk = entry.Disk!.Value.Open.Disk;
                    return new DiskStatus(entry.Name, entry.Disk.Value.Path, disk.Backend.Length, disk.IsReadOnly, entry.Port is not null || entry.Unit is not null, disk.Kept);
                })];
            }
        }
    }

    /// <summary>What firmware tries to boot from, first to last.</summary>
    public IReadOnlyList<BootChoice> BootOrder => [.. _bootable.OrderBy(entry => entry.Index).Select(entry => entry.Choice)];

    /// <summary>Adds a disk while the board is built.</summary>
    public void AddAtStart(DiskConfiguration disk) => Add(disk, plugged: false);

    public void AddDisk(DiskConfiguration disk) => Add(disk, plugged: true);

    public IReadOnlyList<NicConnection> Nics
    {
        get
        {
            lock (_lock)
                return [.. _entries.Where(entry => entry.Nic is not null).Select(entry => entry.Nic!)];
        }
    }

    /// <summary>Adds a NIC while the board is built.</summary>
    public void AddAtStart(NicConnection nic) => Add(nic, plugged: false);

    public void AddNic(NicConnection nic) => Add(nic, plugged: true);

    public void Remove(string name)
    {
        Entry entry = Find(name);
        if (entry.Unit is not null)
        {
            lock (_lock)
                _entries.Remove(entry);
            ((VirtioScsi)entry.Device).Detach(entry.Unit);
            board.Disown(entry.Disk!.Value.Open);
            return;
        }
        if (entry.Port is null)
            throw new MachineException($"{name} was there at the start and stays: only devices that were added while the VM runs can be removed");
        entry.Port.RequestRemoval();
    }

    public void ResizeDisk(string name, long bytes)
    {
        Entry entry = Find(name);
        if (entry.Disk is not { } disk)
            throw new MachineException($"{name} is no disk");
        if (bytes <= 0 || bytes % VirtioBlk.SectorSize != 0)
            throw new MachineException($"{bytes} bytes are no multiple of {VirtioBlk.SectorSize}");
        try
        {
            disk.Open.Disk.Backend.ResizeAsync(bytes).AsTask().GetAwaiter().GetResult();
        }
        catch (BlockException error)
        {
            throw new MachineException($"cannot resize {name}: {error.Message}", error);
        }
    }

    public BalloonStatus? Balloon
    {
        get
        {
            if (_balloon is not { } balloon)
                return null;
            // A guest that runs answers at once. What one said last has to do where it does not.
            int taken = balloon.StatisticsTaken;
            balloon.AskStatistics();
            if (balloon.IsRunning && taken > 0)
                SpinWait.SpinUntil(() => balloon.StatisticsTaken != taken, LongestStatistics);
            return new BalloonStatus(board.Memory.Size, balloon.Actual, balloon.GivenBack, balloon.Statistics);
        }
    }

    public void SetMemory(ulong bytes)
    {
        if (bytes > board.Memory.Size)
            throw new MachineException($"the VM has {board.Memory.Size >> 20} MiB, and a balloon cannot give it more");
        (_balloon ?? throw NoBalloon()).SetTarget(board.Memory.Size - bytes);
    }

    public void ReclaimFreePages()
    {
        if (!(_balloon ?? throw NoBalloon()).AskFreePages())
            throw new MachineException("the guest's driver names no free pages");
    }

    public void ResizeConsole(ushort columns, ushort rows) => (_console ?? throw new MachineException("the VM has no virtio console")).Resize(columns, rows);

    /// <summary>Adds the SCSI controller while the board is built, for units that come later.</summary>
    public void AddController() => Controller(plugged: false);

    /// <summary>Adds a device that there is one of, while the board is built.</summary>
    public void Add(VirtioBalloon balloon)
    {
        if (_balloon is not null)
            throw new MachineException("a VM has one balloon");
        board.Places(balloon.Name).Add(balloon);
        _balloon = balloon;
    }

    /// <inheritdoc cref="Add(VirtioBalloon)"/>
    public void Add(VirtioConsole console)
    {
        board.Places(console.Name).Add(console);
        _console = console;
    }

    private static MachineException NoBalloon() => new("the VM has no balloon: start it with --device virtio-balloon");

    /// <summary>The SCSI controller, which comes with the first disk for it.</summary>
    private VirtioScsi Controller(bool plugged)
    {
        if (_scsi is not null)
            return _scsi;
        VirtioScsi controller = new("scsi", board.Memory);
        if (plugged)
            Insert(new Entry(controller.Name, controller, FreePort(), null, null));
        else
            _scsiPath = board.Places(controller.Name).Add(controller);
        _scsi = controller;
        return controller;
    }

    private void AddUnit(DiskConfiguration disk, bool plugged)
    {
        OpenDisk open = board.Own(OpenDisk.Open(disk, pause));
        try
        {
            VirtioScsi controller = Controller(plugged);
            int target = controller.FreeTarget;
            if (target < 0)
                throw new MachineException("the SCSI controller has all the disks that it can have");
            ScsiUnit unit = new(open.Disk, target, 0);
            lock (_lock)
                _entries.Add(new Entry(disk.Settings.Name, controller, null, (open, disk.Path), null, unit));
            controller.Attach(unit);
            if (!plugged && _scsiPath is { } path)
                Boots(disk, string.Create(CultureInfo.InvariantCulture, $"{path}/channel@0/disk@{target:x},0"));
        }
        catch
        {
            board.Disown(open);
            throw;
        }
    }

    private void Add(DiskConfiguration disk, bool plugged)
    {
        string name = disk.Settings.Name;
        CheckName(name);
        if (disk.Bus == DiskBus.Scsi)
        {
            AddUnit(disk, plugged);
            return;
        }
        PcieRootPort? port = plugged ? FreePort() : null;
        OpenDisk open = OpenDisk.Open(disk, pause);
        try
        {
            int queues = disk.Queues > 0 ? disk.Queues : Math.Min(cpus, MaximumQueues);
            VirtioBlk device = new(name, board.Memory, open.Disk, queues, Math.Min(queues, Environment.ProcessorCount));
            if (port is not null)
            {
                Insert(new Entry(name, device, port, (open, disk.Path), open));
                return;
            }
            board.Own(open);
            string? path = board.Places(name).Add(device);
            if (path is not null)
                Boots(disk, $"{path}/disk@0,0");
            lock (_lock)
                _entries.Add(new Entry(name, device, null, (open, disk.Path), null));
        }
        catch
        {
            open.Dispose();
            throw;
        }
    }

    private void Boots(DiskConfiguration disk, string path) => _bootable.Add((disk.BootIndex ?? int.MaxValue, new BootChoice(path, !disk.Settings.IsCd)));

    private void Add(NicConnection nic, bool plugged)
    {
        CheckName(nic.Name);
        PcieRootPort? port = plugged ? FreePort() : null;
        VirtioNet device = new(nic.Name, board.Memory, nic.Backend, nic.Settings);
        nic.Device = device;
        Entry entry = new(nic.Name, device, port, null, null, Nic: nic);
        if (port is not null)
        {
            Insert(entry);
        }
        else
        {
            board.Places(nic.Name).Add(device);
            lock (_lock)
                _entries.Add(entry);
        }
        // What is owned last goes first: the threads that carry frames end before the device does.
        board.Own(nic.Backend);
        device.Connect();
    }

    private void Insert(Entry entry)
    {
        if (entry.Backend is not null)
            board.Own(entry.Backend);
        board.Own(entry.Device);
        board.AddPausable(entry.Device);
        lock (_lock)
            _entries.Add(entry);
        entry.Port!.Insert(new VirtioPci(entry.Device, transitional: false, express: true));
    }

    /// <summary>The guest has let go of a slot's device. It is freed on another thread: that may wait for a disk, and this is a vCPU's.</summary>
    private void OnEjected(PcieRootPort port)
    {
        Entry? entry;
        lock (_lock)
        {
            entry = _entries.Find(candidate => candidate.Port == port && !_leaving.Contains(candidate));
            if (entry is null)
                return;
            _leaving.Add(entry);
        }
        ThreadPool.QueueUserWorkItem(_ =>
        {
            if (entry.Nic is not null)
                board.Disown(entry.Nic.Backend);
            board.RemovePausable(entry.Device);
            board.Disown(entry.Device);
            if (entry.Backend is not null)
                board.Disown(entry.Backend);
            lock (_lock)
            {
                _entries.Remove(entry);
                _leaving.Remove(entry);
            }
        });
    }

    private PcieRootPort FreePort()
    {
        foreach (PcieRootPort port in board.RootPorts)
        {
            if (port.Occupant is null)
                return port;
        }
        throw new MachineException(board.RootPorts.Count == 0 ? "this machine has no slots to plug into" : $"all {board.RootPorts.Count} slots are taken");
    }

    private Entry Find(string name)
    {
        lock (_lock)
            return _entries.Find(entry => entry.Name == name) ?? throw new MachineException($"there is no device {name}");
    }

    private void CheckName(string name)
    {
        lock (_lock)
        {
            if (_entries.Exists(entry => entry.Name == name))
                throw new MachineException($"there is a device {name} already");
        }
    }

    /// <summary>Hears of a slot's ejections.</summary>
    public void Watch(PcieRootPort port) => port.Ejected += _ => OnEjected(port);
}
