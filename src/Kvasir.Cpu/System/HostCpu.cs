using System;
using System.Buffers.Binary;
using System.Runtime.Intrinsics.X86;
using System.Text;

namespace Kvasir.Cpu;

/// <summary>What the host's own CPUID says.</summary>
internal sealed class HostCpu
{
    private readonly uint[] _words = new uint[(int)CpuidWord.Count];

    private HostCpu(string vendor, uint signature, string brand)
    {
        Vendor = vendor;
        Signature = signature;
        Brand = brand;
    }

    public string Vendor { get; }

    public uint Signature { get; }

    public string Brand { get; }

    public bool Has(CpuFeature feature) => (_words[(int)feature >> 5] >> ((int)feature & 31) & 1) != 0;

    public static HostCpu Read()
    {
        if (!X86Base.IsSupported)
            throw new CpuModelException("the host's processor is not an x86-64 one");
        (int maximum, int b, int c, int d) = X86Base.CpuId(0, 0);
        string vendor = Words(b, d, c);
        (int signature, _, int ecx1, int edx1) = X86Base.CpuId(1, 0);
        (int extended, _, _, _) = X86Base.CpuId(unchecked((int)0x8000_0000), 0);
        string brand = "x86-64 processor";
        if ((uint)extended >= 0x8000_0004)
        {
            StringBuilder text = new();
            for (uint leaf = 0x8000_0002; leaf <= 0x8000_0004; leaf++)
            {
                (int w, int x, int y, int z) = X86Base.CpuId((int)leaf, 0);
                text.Append(Words(w, x, y, z));
            }
            brand = text.ToString().TrimEnd('\0', ' ');
        }
        HostCpu host = new(vendor, (uint)signature, brand);
        host._words[(int)CpuidWord.Leaf1Ecx] = (uint)ecx1;
        host._words[(int)CpuidWord.Leaf1Edx] = (uint)edx1;
        if (maximum >= 7)
        {
            (_, int ebx, int ecx, int edx) = X86Base.CpuId(7, 0);
            host._words[(int)CpuidWord.Leaf7Ebx] = (uint)ebx;
            host._words[(int)CpuidWord.Leaf7Ecx] = (uint)ecx;
            host._words[(int)CpuidWord.Leaf7Edx] = (uint)edx;
        }
        if (maximum >= 0xd)
            host._words[(int)CpuidWord.LeafDEax] = (uint)X86Base.CpuId(0xd, 1).Eax;
        if ((uint)extended >= 0x8000_0001)
        {
            (_, _, int ecx, int edx) = X86Base.CpuId(unchecked((int)0x8000_0001), 0);
            host._words[(int)CpuidWord.Extended1Ecx] = (uint)ecx;
            host._words[(int)CpuidWord.Extended1Edx] = (uint)edx;
        }
        host.DropDisabledAvx();
        return host;
    }

    /// <summary>AVX instructions work only where the host's kernel enabled their state.</summary>
    private void DropDisabledAvx()
    {
        if (Avx.IsSupported)
            return;
        _words[(int)CpuidWord.Leaf1Ecx] &= ~(1u << 28 | 1u << 12 | 1u << 29);
        _words[(int)CpuidWord.Leaf7Ebx] &= ~(1u << 5);
        _words[(int)CpuidWord.Leaf7Ecx] &= ~(1u << 9 | 1u << 10);
    }

    private static string Words(params ReadOnlySpan<int> words)
    {
        Span<byte> bytes = stackalloc byte[words.Length * 4];
        for (int i = 0; i < words.Length; i++)
            BinaryPrimitives.WriteInt32LittleEndian(bytes[(i * 4)..], words[i]);
        return Encoding.ASCII.GetString(bytes);
    }
}
