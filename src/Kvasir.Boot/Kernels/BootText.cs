using System;
using System.Text;

namespace Kvasir.Boot.Kernels;

/// <summary>Strings as kernels take them: bytes that end with a zero.</summary>
internal static class BootText
{
    /// <summary>A string with its final zero.</summary>
    /// <exception cref="BootException">A zero inside would cut it.</exception>
    public static byte[] ToBytes(string text, string what)
    {
        if (text.Contains('\0', StringComparison.Ordinal))
            throw new BootException($"the {what} contains a zero character");
        byte[] bytes = new byte[Encoding.UTF8.GetByteCount(text) + 1];
        Encoding.UTF8.GetBytes(text, bytes);
        return bytes;
    }
}
