using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using System.Security.Cryptography;
using AesNi = System.Runtime.Intrinsics.X86.Aes;

namespace Kvasir.Block.Crypto;

/// <summary>
/// AES on runs of blocks (FIPS 197), eight at a time with AES-NI, else through the platform's library. Immutable: any number of
/// threads.
/// </summary>
internal sealed class AesCore : BlockAlgorithm
{
    private readonly Vector128<byte>[] _encrypt;
    private readonly Vector128<byte>[] _decrypt;
    private readonly byte[] _key;

    public AesCore(ReadOnlySpan<byte> key)
    {
        if (key.Length is not (16 or 24 or 32))
            throw new BlockException($"AES keys have 16, 24 or 32 bytes, not {key.Length}");
        _key = key.ToArray();
        _encrypt = [];
        _decrypt = [];
        if (!AesNi.IsSupported)
            return;
        _encrypt = Expand(key);
        _decrypt = new Vector128<byte>[_encrypt.Length];
        int last = _encrypt.Length - 1;
        _decrypt[0] = _encrypt[last];
        for (int i = 1; i < last; i++)
            _decrypt[i] = AesNi.InverseMixColumns(_encrypt[last - i]);
        _decrypt[last] = _encrypt[0];
    }

    /// <summary>Encrypts whole blocks in place, each by itself.</summary>
    public override void EncryptBlocks(Span<byte> data)
    {
        if (!AesNi.IsSupported)
        {
            using Aes aes = Aes.Create();
            aes.Key = _key;
            _ = aes.EncryptEcb(data, data, PaddingMode.None);
            return;
        }
        Span<Vector128<byte>> blocks = MemoryMarshal.Cast<byte, Vector128<byte>>(data);
        ReadOnlySpan<Vector128<byte>> keys = _encrypt;
        int i = 0;
        for (; i + 8 <= blocks.Length; i += 8)
            Encrypt8(keys, blocks.Slice(i, 8));
        for (; i < blocks.Length; i++)
            blocks[i] = Encrypt1(keys, blocks[i]);
    }

    /// <summary>Decrypts whole blocks in place, each by itself.</summary>
    public override void DecryptBlocks(Span<byte> data)
    {
        if (!AesNi.IsSupported)
        {
            using Aes aes = Aes.Create();
            aes.Key = _key;
            _ = aes.DecryptEcb(data, data, PaddingMode.None);
            return;
        }
        Span<Vector128<byte>> blocks = MemoryMarshal.Cast<byte, Vector128<byte>>(data);
        ReadOnlySpan<Vector128<byte>> keys = _decrypt;
        int i = 0;
        for (; i + 8 <= blocks.Length; i += 8)
            Decrypt8(keys, blocks.Slice(i, 8));
        for (; i < blocks.Length; i++)
            blocks[i] = Decrypt1(keys, blocks[i]);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<byte> Encrypt1(ReadOnlySpan<Vector128<byte>> keys, Vector128<byte> block)
    {
        block ^= keys[0];
        for (int round = 1; round < keys.Length - 1; round++)
            block = AesNi.Encrypt(block, keys[round]);
        return AesNi.EncryptLast(block, keys[^1]);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<byte> Decrypt1(ReadOnlySpan<Vector128<byte>> keys, Vector128<byte> block)
    {
        block ^= keys[0];
        for (int round = 1; round < keys.Length - 1; round++)
            block = AesNi.Decrypt(block, keys[round]);
        return AesNi.DecryptLast(block, keys[^1]);
    }

    private static void Encrypt8(ReadOnlySpan<Vector128<byte>> keys, Span<Vector128<byte>> b)
    {
        Vector128<byte> k = keys[0];
        Vector128<byte> b0 = b[0] ^ k, b1 = b[1] ^ k, b2 = b[2] ^ k, b3 = b[3] ^ k, b4 = b[4] ^ k, b5 = b[5] ^ k, b6 = b[6] ^ k, b7 = b[7] ^ k;
        for (int round = 1; round < keys.Length - 1; round++)
        {
            k = keys[round];
            b0 = AesNi.Encrypt(b0, k);
            b1 = AesNi.Encrypt(b1, k);
            b2 = AesNi.Encrypt(b2, k);
            b3 = AesNi.Encrypt(b3, k);
            b4 = AesNi.Encrypt(b4, k);
            b5 = AesNi.Encrypt(b5, k);
            b6 = AesNi.Encrypt(b6, k);
            b7 = AesNi.Encrypt(b7, k);
        }
        k = keys[^1];
        b[0] = AesNi.EncryptLast(b0, k);
        b[1] = AesNi.EncryptLast(b1, k);
        b[2] = AesNi.EncryptLast(b2, k);
        b[3] = AesNi.EncryptLast(b3, k);
        b[4] = AesNi.EncryptLast(b4, k);
        b[5] = AesNi.EncryptLast(b5, k);
        b[6] = AesNi.EncryptLast(b6, k);
        b[7] = AesNi.EncryptLast(b7, k);
    }

    private static void Decrypt8(ReadOnlySpan<Vector128<byte>> keys, Span<Vector128<byte>> b)
    {
        Vector128<byte> k = keys[0];
        Vector128<byte> b0 = b[0] ^ k, b1 = b[1] ^ k, b2 = b[2] ^ k, b3 = b[3] ^ k, b4 = b[4] ^ k, b5 = b[5] ^ k, b6 = b[6] ^ k, b7 = b[7] ^ k;
        for (int round = 1; round < keys.Length - 1; round++)
        {
            k = keys[round];
            b0 = AesNi.Decrypt(b0, k);
            b1 = AesNi.Decrypt(b1, k);
            b2 = AesNi.Decrypt(b2, k);
            b3 = AesNi.Decrypt(b3, k);
            b4 = AesNi.Decrypt(b4, k);
            b5 = AesNi.Decrypt(b5, k);
            b6 = AesNi.Decrypt(b6, k);
            b7 = AesNi.Decrypt(b7, k);
        }
        k = keys[^1];
        b[0] = AesNi.DecryptLast(b0, k);
        b[1] = AesNi.DecryptLast(b1, k);
        b[2] = AesNi.DecryptLast(b2, k);
        b[3] = AesNi.DecryptLast(b3, k);
        b[4] = AesNi.DecryptLast(b4, k);
        b[5] = AesNi.DecryptLast(b5, k);
        b[6] = AesNi.DecryptLast(b6, k);
        b[7] = AesNi.DecryptLast(b7, k);
    }

    /// <summary>The key schedule (FIPS 197, 5.2).</summary>
    private static Vector128<byte>[] Expand(ReadOnlySpan<byte> key)
    {
        int words = key.Length / 4;
        int rounds = words + 6;
        uint[] schedule = new uint[4 * (rounds + 1)];
        MemoryMarshal.Cast<byte, uint>(key).CopyTo(schedule);
        byte constant = 1;
        for (int i = words; i < schedule.Length; i++)
        {
            uint word = schedule[i - 1];
            if (i % words == 0)
            {
                word = SubstituteWord(uint.RotateRight(word, 8)) ^ constant;
                constant = (byte)((constant << 1) ^ ((constant >> 7) * 0x1b));
            }
            else if (words > 6 && i % words == 4)
            {
                word = SubstituteWord(word);
            }
            schedule[i] = schedule[i - words] ^ word;
        }
        Vector128<byte>[] keys = new Vector128<byte>[rounds + 1];
        MemoryMarshal.Cast<uint, Vector128<byte>>(schedule).CopyTo(keys);
        return keys;
    }

    // AESKEYGENASSIST leaves the substituted second word in the first lane.
    private static uint SubstituteWord(uint word) => AesNi.KeygenAssist(Vector128.Create(0, word, 0, 0).AsByte(), 0).AsUInt32().GetElement(0);
}
