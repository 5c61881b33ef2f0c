using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Img;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>A folder for one test, removed afterwards.</summary>
internal sealed class TestFolder : IDisposable
{
    private readonly string _path;

    /// <summary>Where temporary files are, unless that is in memory: then what else there is, so that images lie on a file system as a user's do.</summary>
    private static readonly string s_disk = new DriveInfo(Path.GetTempPath()).DriveFormat == "tmpfs" && Directory.Exists("/var/tmp") ? "/var/tmp" : Path.GetTempPath();

    /// <param name="inMemory">Where the host has a file system in memory: programs that flush at their ends do not wait for a disk.</param>
    public TestFolder(bool inMemory = false)
    {
        string place = inMemory && Directory.Exists("/dev/shm") ? "/dev/shm" : s_disk;
        _path = Directory.CreateDirectory(Path.Combine(place, $"kvasir-block-{Guid.NewGuid():N}")).FullName;
    }

    public string this[string name] => Path.Combine(_path, name);

    public void Dispose() => Directory.Delete(_path, recursive: true);
}

/// <summary>Runs the real programs that our images must agree with.</summary>
internal static class Peer
{
    public static async Task<(int Code, string Output)> RunAsync(string program, params string[] args)
    {
        ProcessStartInfo start = new(program, args) { RedirectStandardOutput = true, RedirectStandardError = true, RedirectStandardInput = true };
        using Process process = Process.Start(start) ?? throw new InvalidOperationException(program);
        process.StandardInput.Close();
        Task<string> error = process.StandardError.ReadToEndAsync();
        string output = await process.StandardOutput.ReadToEndAsync();
        string errors = await error;
        await process.WaitForExitAsync();
        return (process.ExitCode, output + errors);
    }

    public static async Task OkAsync(string program, params string[] args)
    {
        (int code, string output) = await RunAsync(program, args);
        Assert.True(code == 0, $"{program} {string.Join(' ', args)} gave {code}: {output}");
    }

    public static void Need(string program)
    {
        foreach (string folder in (Environment.GetEnvironmentVariable("PATH") ?? string.Empty).Split(':'))
        {
            if (File.Exists(Path.Combine(folder, program)))
                return;
        }
        Assert.Skip($"{program} is not installed");
    }

    public static async Task<(int Code, string Output)> ImgAsync(params string[] args)
    {
        using StringWriter output = new();
        int code = await new ImgTool("qemu-img", output, output, true).RunAsync(args);
        return (code, output.ToString());
    }

    public static async Task ImgOkAsync(params string[] args)
    {
        (int code, string output) = await ImgAsync(args);
        Assert.True(code == 0, $"img {string.Join(' ', args)} gave {code}: {output}");
    }

    public static async Task<(int Code, string Output)> IoAsync(params string[] args)
    {
        using StringWriter output = new();
        int code = await new IoTool("qemu-io", TextReader.Null, output, output).RunAsync(args);
        return (code, output.ToString());
    }
}

/// <summary>A file in memory that remembers what was written and where the flushes were.</summary>
internal sealed class RecordingFile : BlockNode
{
    private readonly Lock _lock = new();
    private byte[] _data;
    private long _length;

    public RecordingFile(byte[]? data = null)
    {
        _data = data ?? [];
        _length = _data.Length;
    }

    /// <summary>Data null with Offset -1: a flush; with Offset -2: a new length in Length; else zeros for Length bytes.</summary>
    public List<(long Offset, byte[]? Data, long Length)> Log { get; } = [];

    /// <summary>Called before each write reaches the file; null: nothing.</summary>
    public Action? BeforeWrite { get; set; }

    public override string Driver => "memory";

    public override long Length => _length;

    public override bool IsGrowable => true;

    public byte[] Content()
    {
        lock (_lock)
            return _data.AsSpan(0, (int)_length).ToArray();
    }

    public override ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        lock (_lock)
            Log.Add((-1, null, 0));
        return default;
    }

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        lock (_lock)
        {
            Grow(length);
            Log.Add((-2, null, length));
            if (length < _length)
                _data.AsSpan((int)length, (int)(_length - length)).Clear();
            _length = length;
        }
        return default;
    }

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        lock (_lock)
        {
            int there = (int)Math.Clamp(_length - offset, 0, buffer.Length);
            if (there > 0)
                _data.AsSpan((int)offset, there).CopyTo(buffer.Span);
            buffer.Span[there..].Clear();
        }
        return default;
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        BeforeWrite?.Invoke();
        lock (_lock)
        {
            Grow(offset + buffer.Length);
            Log.Add((offset, buffer.ToArray(), buffer.Length));
            buffer.Span.CopyTo(_data.AsSpan((int)offset));
            _length = Math.Max(_length, offset + buffer.Length);
        }
        return default;
    }

    protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation) =>
        length > 64 << 20 ? throw new BlockException("the test's file is full", BlockErrno.NoSpace) : WriteCoreAsync(offset, new byte[length], WriteFlags.None, cancellation);

    // As a hole in the file: what is discarded reads as zeros.
    protected override ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation) =>
        offset >= _length ? default : WriteCoreAsync(offset, new byte[Math.Min(length, _length - offset)], WriteFlags.None, cancellation);

    private void Grow(long length)
    {
        if (length > 64 << 20)
            throw new BlockException("the test's file is full", BlockErrno.NoSpace);
        if (length > _data.Length)
            Array.Resize(ref _data, (int)Math.Max(length, _data.Length * 2L));
    }
}

/// <summary>What a crash may leave of a <see cref="RecordingFile"/>'s writes.</summary>
internal static class WriteLog
{
    /// <summary>
    /// The file as it may be after a crash: all up to the last flush before the cut, and of what came after that any writes, or any sectors of a write.
    /// </summary>
    public static byte[] Replay(byte[] start, List<(long Offset, byte[]? Data, long Length)> log, int cut, Random random)
    {
        int barrier = -1;
        for (int i = 0; i < cut; i++)
        {
            if (log[i].Offset == -1)
                barrier = i;
        }
        RecordingFile disk = new((byte[])start.Clone());
        for (int i = 0; i < cut; i++)
        {
            (long offset, byte[]? data, long length) = log[i];
            if (offset == -1 || (i > barrier && random.Next(2) == 0))
                continue;
            if (offset == -2)
                disk.ResizeAsync(length).AsTask().Wait();
            else if (i > barrier && data!.Length > 512 && random.Next(4) == 0)
                Tear(disk, offset, data, random);
            else
                disk.WriteAsync(offset, data).AsTask().Wait();
        }
        return disk.Content();
    }

    private static void Tear(RecordingFile disk, long offset, byte[] data, Random random)
    {
        for (int at = 0; at < data.Length;)
        {
            int sector = Math.Min(data.Length - at, 512 - (int)((offset + at) % 512));
            if (random.Next(2) == 0)
                disk.WriteAsync(offset + at, data.AsMemory(at, sector)).AsTask().Wait();
            at += sector;
        }
    }
}
