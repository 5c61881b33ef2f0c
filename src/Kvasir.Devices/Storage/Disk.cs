using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Block;

namespace Kvasir.Devices.Storage;

/// <summary>What happens when the host fails a request.</summary>
public enum ErrorPolicy
{
    /// <summary>The guest sees the error.</summary>
    Report,

    /// <summary>The guest sees success.</summary>
    Ignore,

    /// <summary>The VM is paused, and the request is tried again when it goes on.</summary>
    Stop,

    /// <summary><see cref="Stop"/> where the host has no space left, <see cref="Report"/> otherwise.</summary>
    StopOnNoSpace,
}

/// <summary>What a disk is to its guest, whatever bus it hangs on.</summary>
public sealed record DiskSettings
{
    /// <summary>What people and the monitor know it by.</summary>
    public required string Name { get; init; }

    /// <summary>Shown to the guest; at most 20 characters on virtio-blk.</summary>
    public string Serial { get; init; } = "";

    /// <summary>It is a CD: read-only, and its medium can be changed.</summary>
    public bool IsCd { get; init; }

    /// <summary>Logical and physical block sizes in bytes, powers of two.</summary>
    public int LogicalBlock { get; init; } = 512;
    public int PhysicalBlock { get; init; } = 4096;

    public ErrorPolicy WriteError { get; init; } = ErrorPolicy.StopOnNoSpace;
    public ErrorPolicy ReadError { get; init; } = ErrorPolicy.Report;
}

/// <summary>
/// A disk between its device and its back end: the guest-visible settings, and what to do when the host fails. Requests that wait for the VM to go on
/// are kept here, so that nothing is lost.
/// </summary>
public sealed class Disk
{
    private readonly Action<string>? _pause;
    private readonly Lock _lock = new();
    private readonly List<DiskRequest> _kept = [];

    /// <param name="backend">The image. Whoever opened it closes it.</param>
    /// <param name="pause">Pauses the VM, saying why; null where nobody can, and errors are reported then.</param>
    public Disk(BlockBackend backend, DiskSettings settings, Action<string>? pause = null)
    {
        Backend = backend;
        Settings = settings;
        _pause = pause;
    }

    public BlockBackend Backend { get; }

    public DiskSettings Settings { get; }

    public bool IsReadOnly => Settings.IsCd || Backend.IsReadOnly;

    /// <summary>Requests that wait for the VM to go on.</summary>
    public int Kept
    {
        get
        {
            lock (_lock)
                return _kept.Count;
        }
    }

    /// <summary>The requests that wait, in the order in which they failed; they stay.</summary>
    internal DiskRequest[] PeekKept()
    {
        lock (_lock)
            return [.. _kept];
    }

    /// <summary>Takes the requests that waited, in the order in which they failed.</summary>
    public DiskRequest[] TakeKept()
    {
        lock (_lock)
        {
            if (_kept.Count == 0)
                return [];
            DiskRequest[] requests = [.. _kept];
            _kept.Clear();
            return requests;
        }
    }

    /// <summary>Takes some of the requests that waited.</summary>
    public DiskRequest[] TakeKept(Predicate<DiskRequest> which)
    {
        lock (_lock)
        {
            DiskRequest[] requests = [.. _kept.FindAll(which)];
            _ = _kept.RemoveAll(Array.AsReadOnly(requests).Contains);
            return requests;
        }
    }

    /// <summary>Decides what comes of a failed request.</summary>
    /// <returns>The error to report, 0 for success; or -1 where the request was kept for later.</returns>
    internal int Judge(DiskRequest request)
    {
        ErrorPolicy policy = request.Operation == BlockOperation.Read ? Settings.ReadError : Settings.WriteError;
        bool stop = policy == ErrorPolicy.Stop || (policy == ErrorPolicy.StopOnNoSpace && request.Error == BlockErrno.NoSpace);
        if (stop && _pause is not null)
        {
            string reason = $"disk {Settings.Name}: {request.ErrorText}";
            lock (_lock)
                _kept.Add(request);
            _pause(reason);
            return -1;
        }
        return policy == ErrorPolicy.Ignore ? 0 : request.Error;
    }
}
