using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>The C library's allocator (mallopt(3)).</summary>
public static partial class NativeHeap
{
    private const int MapThreshold = -3;

    /// <summary>
    /// Has blocks from a size on mapped alone, whose memory goes back to the host as soon as they are freed. Left to itself the allocator takes larger and larger
    /// blocks from the heap of the thread that asks, where they keep their memory as long as anything above them is in use.
    /// </summary>
    /// <param name="bytes">The size; at most 32 MiB.</param>
    /// <returns>False where the C library does as it likes.</returns>
    public static bool MapBlocksFrom(int bytes)
    {
        try
        {
            return mallopt(MapThreshold, bytes) == 1;
        }
        catch (System.EntryPointNotFoundException)
        {
            return false;
        }
    }

    [LibraryImport("libc")]
    private static partial int mallopt(int parameter, int value);
}
