using System;
using Kvasir.Linux;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>The memory shared with the helper process: the window's pages, their pristine contents, and a batch of records.</summary>
internal sealed unsafe class SharedArea : IDisposable
{
    public const int Batch = 1024;
    private const int WindowAt = 0x10000;
    private const int PristineAt = 0x20000;
    private const int RecordsAt = 0x30000;
    private const ulong Size = RecordsAt + Batch * 4096ul;

    private readonly byte* _memory;

    public SharedArea()
    {
        Fd = MemoryMap.CreateFile("oracle", Size);
        _memory = MemoryMap.MapFile(Fd, 0, Size, Protection.Read | Protection.Write);
        FillPristine(Pristine);
    }

    public int Fd { get; }

    /// <summary>Number of the record that the helper is at.</summary>
    public uint Progress => *(uint*)_memory;

    public byte* HostWindow => _memory + WindowAt;

    public byte* Pristine => _memory + PristineAt;

    public OracleRecord* Record(int index)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)index, (uint)Batch);
        // SAFETY: the area holds Batch records from RecordsAt on.
        return (OracleRecord*)(_memory + RecordsAt) + index;
    }

    public void Dispose()
    {
        MemoryMap.Unmap(_memory, Size);
        MemoryMap.CloseFile(Fd);
    }

    /// <summary>The contents every case starts from: random data, runs of equal bytes (string compares), and small values.</summary>
    private static void FillPristine(byte* memory)
    {
        Dice dice = new(0x6b76_6173_6972);
        ulong* words = (ulong*)memory;
        for (uint at = 0; at < Window.Size; at += 8)
        {
            words[at / 8] = (at >> 12) switch
            {
                3 => dice.Next(),
                4 => dice.Lane((Flavour)(at >> 8 & 3) + 1),
                6 or 7 => 0x4141_4141_4141_4141ul ^ (dice.Percent(5) ? 1ul << dice.Below(64) : 0),
                _ => dice.Next() & 0x0101_0101_0101_0101,
            };
        }
    }
}
