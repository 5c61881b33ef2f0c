using System;
using System.Collections.Generic;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>
/// Finds the parent of a differencing disk by the names that the image has for it, which programs on Windows wrote most often: a name relative to the
/// image, then absolute ones, and where these mean nothing here their last part, beside the image.
/// </summary>
internal sealed class ParentSearch
{
    private const int LongestName = 4096;

    private readonly List<string> _relative = [];
    private readonly List<string> _absolute = [];
    private readonly List<string> _beside = [];

    /// <summary>Takes in one name.</summary>
    public void Add(string name)
    {
        name = name.TrimEnd('\0');
        if (name.Length is 0 or > LongestName || name.AsSpan().ContainsAnyInRange('\0', '\x1f'))
            return;
        if (name.StartsWith("file://", StringComparison.OrdinalIgnoreCase) && Uri.TryCreate(name, UriKind.Absolute, out Uri? address))
            name = address.AbsolutePath is { Length: > 0 } path ? Uri.UnescapeDataString(path) : name;
        string unix = name.Replace('\\', '/');
        bool drive = unix.Length >= 2 && unix[1] == ':' && char.IsAsciiLetter(unix[0]);
        bool volume = unix.StartsWith("//", StringComparison.Ordinal);
        if (!drive && unix[0] != '/')
        {
            _relative.Add(Plain(unix.StartsWith("./", StringComparison.Ordinal) ? unix[2..] : unix));
            return;
        }
        if (!drive && !volume)
            _absolute.Add(unix);
        _beside.Add(Plain(unix[(unix.LastIndexOf('/') + 1)..]));
    }

    /// <summary>The name of the first file that is the parent; where none is, the first that is there, else the first.</summary>
    /// <param name="image">The file of the image.</param>
    /// <param name="isParent">Whether a file is the one.</param>
    /// <exception cref="BlockException">There is no name at all.</exception>
    public async ValueTask<string> FindAsync(BlockNode image, Func<BlockNode, ValueTask<bool>> isParent)
    {
        string? there = null;
        string? first = null;
        foreach (string name in (string[])[.. _relative, .. _absolute, .. _beside])
        {
            if (name.Length == 0)
                continue;
            first ??= name;
            HostFile file;
            try
            {
                file = HostFile.Open(Image.ResolveBacking(image.FileName, name), new HostFileOptions { ReadOnly = true, Lock = false, Async = AsyncMode.Threads });
            }
            catch (BlockException)
            {
                continue;
            }
            await using (file.ConfigureAwait(false))
            {
                there ??= name;
                try
                {
                    if (await isParent(file).ConfigureAwait(false))
                        return name;
                }
                catch (BlockException)
                {
                    // Another kind of file, or a damaged one: it is told of where it is opened in earnest.
                }
            }
        }
        return there ?? first ?? throw new BlockException($"'{image.FileName}' is a differencing disk that does not name its parent");
    }

    /// <summary>A name that is a file's and nothing else: no protocol, no description of a graph.</summary>
    private static string Plain(string name) => Image.HasProtocol(name) || name.StartsWith("json:", StringComparison.Ordinal) ? "./" + name : name;
}
