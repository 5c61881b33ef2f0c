using System;
using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Cpu;

/// <summary>A call from translated code to a stub that must know where it came from: the operation there, how to get its flags, and where to go on.</summary>
internal struct CodeSite
{
    /// <summary>Offset in the code memory of what follows the call.</summary>
    public uint After;

    /// <summary>Distance in the operations of the one it is for.</summary>
    public uint Op;

    /// <summary>Offset in the code memory to go on at after the operation; 0: nowhere.</summary>
    public uint Resume;

    /// <summary>Displacement from the state of what T1 holds at <see cref="Resume"/>, or <see cref="NotMirrored"/>.</summary>
    public int Mirrored;

    /// <summary>Where the flags before the operation come from.</summary>
    public FlagRecipe Flags;

    /// <summary>The host's flags are to hold the guest's at <see cref="Resume"/>.</summary>
    public bool ReloadFlags;

    public const int NotMirrored = int.MinValue;
}

/// <summary>The sites of all translated code, in order of their addresses. Added to under <see cref="CodeCache.Gate"/>, searched by any vCPU.</summary>
internal sealed unsafe class CodeSites : IDisposable
{
    private const int Capacity = 1 << 21;
    private const int Recent = 512;

    private readonly CodeSite* _sites = (CodeSite*)MemoryMap.MapAnonymousMemory((ulong)(Capacity * sizeof(CodeSite)), Protection.Read | Protection.Write);

    /// <summary>Number of the site that was found last for a hash of its address: a hint.</summary>
    private readonly int[] _recent = new int[Recent];
    private int _count;

    /// <summary>Whether a block's may not fit.</summary>
    public bool IsFull => _count + 1024 > Capacity;

    public void Add(in CodeSite site)
    {
        _sites[_count] = site;
        Volatile.Write(ref _count, _count + 1);
    }

    public void Clear() => _count = 0;

    /// <summary>The site whose call returns to an offset.</summary>
    /// <exception cref="InvalidOperationException">There is none.</exception>
    public CodeSite* Find(uint after)
    {
        ref int recent = ref _recent[after % Recent];
        int low = recent;
        int high = Volatile.Read(ref _count);
        if (low < high && _sites[low].After == after)
            return _sites + low;
        low = 0;
        while (low < high)
        {
            int middle = (low + high) >>> 1;
            if (_sites[middle].After < after)
                low = middle + 1;
            else
                high = middle;
        }
        if (low >= _count || _sites[low].After != after)
            throw new InvalidOperationException("a call from translated code that nobody knows");
        recent = low;
        return _sites + low;
    }

    public void Dispose() => MemoryMap.Unmap((byte*)_sites, (ulong)(Capacity * sizeof(CodeSite)));
}
