using System;

namespace Kvasir.Linux;

/// <summary>
/// Memory for machine code, mapped twice from one memory file: once to write and once to execute, so that no page is ever both. Pages are allocated
/// when they are first written.
/// </summary>
public sealed unsafe class ExecutableMemory : IDisposable
{
    // Configuration
    private readonly ulong _size;

    // State
    private readonly int _fd;
    private readonly byte* _writable;
    private readonly byte* _executable;
    private bool _disposed;

    /// <param name="name">Shown by the kernel in /proc/PID/maps.</param>
    /// <param name="size">Bytes to reserve, a multiple of 4 KiB.</param>
    /// <exception cref="LinuxException">The kernel refused; executable mappings may be forbidden by a security policy.</exception>
    public ExecutableMemory(string name, ulong size)
    {
        _size = size;
        _fd = MemoryMap.CreateFile(name, size);
        try
        {
            _writable = MemoryMap.MapFile(_fd, 0, size, Protection.Read | Protection.Write);
            _executable = MemoryMap.MapFile(_fd, 0, size, Protection.Read | Protection.Execute);
        }
        catch (LinuxException)
        {
            if (_writable != null)
                MemoryMap.Unmap(_writable, size);
            MemoryMap.CloseFile(_fd);
            throw;
        }
    }

    /// <summary>Bytes reserved.</summary>
    public ulong Size => _size;

    /// <summary>Where code is executed: the same bytes as those written.</summary>
    public byte* Executable => _executable;

    /// <summary>Writes code at an offset. Code that may be executing must not be overwritten.</summary>
    /// <exception cref="ArgumentOutOfRangeException">It does not fit there.</exception>
    public void Write(ulong offset, ReadOnlySpan<byte> code)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(offset, _size);
        ArgumentOutOfRangeException.ThrowIfGreaterThan((ulong)code.Length, _size - offset, nameof(code));
        // SAFETY: [offset, offset + length) lies inside the mapping.
        code.CopyTo(new Span<byte>(_writable + offset, code.Length));
    }

    /// <summary>Changes 8 bytes of code in one write, whoever executes it. <paramref name="offset"/> is a multiple of 8.</summary>
    public void Patch(uint offset, ulong value)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((ulong)offset + 8, _size, nameof(offset));
        // SAFETY: inside the mapping.
        System.Threading.Volatile.Write(ref *(ulong*)(_writable + offset), value);
    }

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        MemoryMap.Unmap(_writable, _size);
        MemoryMap.Unmap(_executable, _size);
        MemoryMap.CloseFile(_fd);
    }
}
