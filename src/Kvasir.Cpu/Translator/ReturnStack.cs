namespace Kvasir.Cpu;

/// <summary>
/// While translated code runs, the host's stack holds where the guest's calls will return to: for each the host address that the host's CALL pushed, and above it
/// the guest's return address. A guest's RET that finds its own target there executes as the host's RET, which the processor predicts. Whenever translated code is left the
/// stack is dropped, so that an entry never outlives the address space, mode, privilege and mapping that it was made in; after a mismatch one entry goes, and the next
/// few are tried (a guest that pops its return address, or overwrites it, as a retpoline does, is back in step then).
/// </summary>
internal static class ReturnStack
{
    /// <summary>Bytes of an entry: the host's alignment of 16 stays as it is.</summary>
    public const int EntrySize = 16;

    /// <summary>Displacement of the guest's address in an entry.</summary>
    public const int GuestAddress = 8;

    /// <summary>Entries that a mismatch looks at beyond the one it drops.</summary>
    public const int Tries = 3;

    /// <summary>Bytes of the host's stack that it takes at most: an overflow empties it.</summary>
    public const int Capacity = 4096 * EntrySize;

    /// <summary>At the bottom: nothing reads beyond.</summary>
    public const int Sentinels = Tries + 1;
}
