using System.IO;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>Whose a folder is (stat(2)); .NET shows modes but not owners.</summary>
public static unsafe partial class FileOwner
{
    private const int AtCurrentFolder = -100;
    private const int AtNoFollow = 0x100;
    private const uint StatxUid = 0x8;

    /// <summary>Whether a path is a folder itself, not a link to one, that the effective user owns and nobody else may write.</summary>
    public static bool IsOwnFolder(string path)
    {
        DirectoryInfo folder = new(path);
        if (!folder.Exists || folder.LinkTarget is not null)
            return false;
        const UnixFileMode others = UnixFileMode.GroupWrite | UnixFileMode.OtherWrite;
        return (folder.UnixFileMode & others) == 0 && TryGetOwner(path, out uint owner) && owner == ProcessIdentity.EffectiveUser;
    }

    private static bool TryGetOwner(string path, out uint owner)
    {
        Statx status = default;
        // SAFETY: the buffer has the 256 bytes of struct statx.
        int result = statx(AtCurrentFolder, path, AtNoFollow, StatxUid, &status);
        owner = status.Uid;
        return result == 0;
    }

    /// <summary>struct statx (linux/stat.h); only the owner is of interest.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 256)]
    private struct Statx
    {
        [FieldOffset(20)]
        public uint Uid;
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int statx(int folder, string path, int flags, uint mask, Statx* status);
}
