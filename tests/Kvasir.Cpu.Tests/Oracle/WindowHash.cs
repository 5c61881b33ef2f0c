using System;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>A hash of what changed in the window's data pages; oracle.c computes the same.</summary>
internal static class WindowHash
{
    private const int Line = 64;

    /// <summary>Hashes every line that differs from the pristine contents, and makes it pristine again.</summary>
    public static unsafe ulong TakeChanges(byte* window, byte* pristine)
    {
        ulong hash = 0;
        for (uint page = 0; page < Window.Pages; page++)
        {
            if (!Window.IsData(page))
                continue;
            Span<byte> a = new(window + page * 4096, 4096);
            ReadOnlySpan<byte> b = new(pristine + page * 4096, 4096);
            int at = 0;
            while (true)
            {
                int same = a[at..].CommonPrefixLength(b[at..]);
                at += same;
                if (at >= 4096)
                    break;
                at &= ~(Line - 1);
                hash = Mix(hash, page * 4096 + (uint)at);
                ulong* words = (ulong*)(window + page * 4096 + at);
                ulong* clean = (ulong*)(pristine + page * 4096 + at);
                for (int i = 0; i < Line / 8; i++)
                {
                    hash = Mix(hash, words[i]);
                    words[i] = clean[i];
                }
                at += Line;
                if (at >= 4096)
                    break;
            }
        }
        return hash;
    }

    private static ulong Mix(ulong hash, ulong word)
    {
        hash = (hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        return hash ^ hash >> 29;
    }
}
