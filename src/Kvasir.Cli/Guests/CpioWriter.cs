using System;
using System.Collections.Generic;
using System.IO;
using System.Text;

namespace Kvasir.Cli.Guests;

/// <summary>
/// Writes a cpio archive in the "newc" format that the kernel unpacks as its initial file system (Linux
/// Documentation/driver-api/early-userspace/buffer-format.rst). All files belong to root and carry no time, so that equal content gives
/// equal bytes.
/// </summary>
internal sealed class CpioWriter(Stream output)
{
    private const uint KindFifoMask = 0xf000;
    private const uint KindFolder = 0x4000;
    private const uint KindFile = 0x8000;
    private const uint KindLink = 0xa000;
    private const uint KindCharacterDevice = 0x2000;

    private readonly HashSet<string> _names = new(StringComparer.Ordinal);
    private long _written;
    private uint _inode = 1;

    /// <summary>Adds a folder. Those above it must have been added before.</summary>
    public void AddFolder(string path, uint mode = 0x1ed) => Add(path, KindFolder | mode, [], 0, 0);

    public void AddFile(string path, ReadOnlySpan<byte> content, uint mode = 0x1a4) => Add(path, KindFile | mode, content, 0, 0);

    /// <summary>Adds a symbolic link.</summary>
    public void AddLink(string path, string target) => Add(path, KindLink | 0x1ff, Encoding.UTF8.GetBytes(target), 0, 0);

    public void AddCharacterDevice(string path, uint major, uint minor, uint mode = 0x180) => Add(path, KindCharacterDevice | mode, [], major, minor);

    /// <summary>Writes the entry that ends the archive and pads it to the 512 bytes that tools expect.</summary>
    public void Finish()
    {
        WriteEntry("TRAILER!!!", 0, [], 0, 0, 0);
        Pad(512);
        output.Flush();
    }

    private void Add(string path, uint mode, ReadOnlySpan<byte> content, uint major, uint minor)
    {
        if (path.Length == 0 || path[0] == '/' || path.Contains('\0', StringComparison.Ordinal))
            throw new ArgumentException($"'{path}' is no relative path", nameof(path));
        int slash = path.LastIndexOf('/');
        if (slash > 0 && !_names.Contains(path[..slash]))
            throw new ArgumentException($"'{path}' comes before its folder", nameof(path));
        if (!_names.Add(path))
            throw new ArgumentException($"'{path}' is there already", nameof(path));
        WriteEntry(path, mode, content, major, minor, _inode++);
    }

    private void WriteEntry(string path, uint mode, ReadOnlySpan<byte> content, uint major, uint minor, uint inode)
    {
        byte[] name = Encoding.UTF8.GetBytes(path);
        uint links = (mode & KindFifoMask) == KindFolder ? 2u : 1u;
        StringBuilder header = new("070701", 110);
        ReadOnlySpan<uint> fields = [inode, mode, 0, 0, links, 0, (uint)content.Length, 0, 0, major, minor, (uint)name.Length + 1, 0];
        foreach (uint field in fields)
            header.Append(field.ToString("x8", System.Globalization.CultureInfo.InvariantCulture));
        Write(Encoding.ASCII.GetBytes(header.ToString()));
        Write(name);
        Write([0]);
        Pad(4);
        Write(content);
        Pad(4);
    }

    private void Write(ReadOnlySpan<byte> bytes)
    {
        output.Write(bytes);
        _written += bytes.Length;
    }

    private void Pad(int alignment)
    {
        int missing = (int)(-_written & (alignment - 1));
        Write(new byte[missing]);
    }
}
