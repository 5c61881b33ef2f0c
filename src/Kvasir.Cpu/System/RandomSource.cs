using System;
using System.Buffers.Binary;
using System.Security.Cryptography;

namespace Kvasir.Cpu;

/// <summary>Random numbers of the host's generator for one vCPU, fetched in batches.</summary>
internal sealed class RandomSource
{
    private readonly byte[] _numbers = new byte[512];
    private int _used = 512;

    public ulong Next()
    {
        if (_used == _numbers.Length)
        {
            RandomNumberGenerator.Fill(_numbers);
            _used = 0;
        }
        Span<byte> number = _numbers.AsSpan(_used, 8);
        ulong value = BinaryPrimitives.ReadUInt64LittleEndian(number);
        // A number that was handed out must not be found in memory later.
        number.Clear();
        _used += 8;
        return value;
    }
}
