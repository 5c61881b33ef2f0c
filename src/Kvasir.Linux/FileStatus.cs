using System.IO;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>What .NET does not tell of a file: whose it is, and whether it is a socket (statx(2)).</summary>
public static unsafe partial class FileStatus
{
    private const int AtCurrentFolder = -100;
    private const int AtNoFollow = 0x100;
    private const uint StatxType = 0x1;
    private const uint StatxUid = 0x8;
    private const ushort KindMask = 0xf000;
    private const ushort KindSocket = 0xc000;

    /// <summary>Whether a path is a folder itself, not a link to one, that the effective user owns and nobody else may write.</summary>
    public static bool IsOwnFolder(string path)
    {
        DirectoryInfo folder = new(path);
        if (!folder.Exists || folder.LinkTarget is not null)
            return false;
        const UnixFileMode others = UnixFileMode.GroupWrite | UnixFileMode.OtherWrite;
        return (folder.UnixFileMode & others) == 0 && TryGet(path, StatxUid, out Statx status) && status.Uid == ProcessIdentity.EffectiveUser;
    }

    /// <summary>Whether a path is a socket itself, not a link to one.</summary>
    public static bool IsSocket(string path) => TryGet(path, StatxType, out Statx status) && (status.Mode & KindMask) == KindSocket;

    private static bool TryGet(string path, uint mask, out Statx status)
    {
        Statx result = default;
        // SAFETY: the buffer has the 256 bytes of struct statx.
        bool found = statx(AtCurrentFolder, path, AtNoFollow, mask, &result) == 0;
        status = result;
        return found;
    }

    /// <summary>struct statx (linux/stat.h); owner and kind are of interest.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 256)]
    private struct Statx
    {
        [FieldOffset(20)]
        public uint Uid;

        [FieldOffset(28)]
        public ushort Mode;
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int statx(int folder, string path, int flags, uint mask, Statx* status);
}
