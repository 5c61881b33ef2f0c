using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
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

    public bool ReadOnly { get; init; }

    /// <summary>Shown to the guest; at most 20 characters on virtio-blk.</summary>
    public string Serial { get; init; } = "";

    /// <summary>Discards reach the image.</summary>
    public bool Discard { get; init; } = true;

    /// <summary>Logical and physical block sizes in bytes, powers of two.</summary>
    public int LogicalBlock { get; init; } = 512;
    public int PhysicalBlock { get; init; } = 4096;

    public ErrorPolicy WriteError { get; init; } = ErrorPolicy.StopOnNoSpace;
    public ErrorPolicy ReadError { get; init; } = ErrorPolicy.Report;
}

/// <summary>
/// The host side of a disk: a block node, and what to do when it fails. Requests that wait for the VM to go on are kept here, so that nothing is lost.
/// </summary>
public sealed class DiskBackend : IAsyncDisposable
{
    private readonly Action<string>? _pause;
    private readonly Lock _lock = new();
    private readonly List<BlockRequest> _parked = [];

    /// <param name="node">The image; the back end owns it.</param>
    /// <param name="pause">Pauses the VM, saying why; null where nobody can, and errors are reported then.</param>
    public DiskBackend(BlockNode node, DiskSettings settings, Action<string>? pause = null)
    {
        Node = node;
        Settings = settings with { ReadOnly = settings.ReadOnly || node.IsReadOnly };
        _pause = pause;
    }

    public BlockNode Node { get; }

    public DiskSettings Settings { get; }

    /// <summary>Bytes.</summary>
    public long Length => Node.Length;

    /// <summary>The disk has a new size.</summary>
    public event Action? Resized;

    /// <summary>Requests that wait for the VM to go on.</summary>
    public int Parked
    {
        get
        {
            lock (_lock)
                return _parked.Count;
        }
    }

    /// <summary>Changes the size while the guest runs.</summary>
    /// <exception cref="BlockException">The image cannot be resized.</exception>
    public async Task ResizeAsync(long length)
    {
        await Node.ResizeAsync(length).ConfigureAwait(false);
        Resized?.Invoke();
    }

    /// <summary>Takes the requests that waited.</summary>
    public BlockRequest[] TakeParked()
    {
        lock (_lock)
        {
            BlockRequest[] requests = [.. _parked];
            _parked.Clear();
            return requests;
        }
    }

    public ValueTask DisposeAsync() => Node.DisposeAsync();

    /// <summary>Decides what comes of a failed request.</summary>
    /// <returns>The error to report, 0 for success; or -1 where the request was kept for later.</returns>
    internal int Judge(BlockRequest request, int errno, string message)
    {
        ErrorPolicy policy = request.Operation == BlockOperation.Read ? Settings.ReadError : Settings.WriteError;
        bool stop = policy == ErrorPolicy.Stop || (policy == ErrorPolicy.StopOnNoSpace && errno == BlockErrno.NoSpace);
        if (stop && _pause is not null)
        {
            lock (_lock)
                _parked.Add(request);
            _pause($"disk {Settings.Name}: {message}");
            return -1;
        }
        return policy == ErrorPolicy.Ignore ? 0 : errno;
    }
}
