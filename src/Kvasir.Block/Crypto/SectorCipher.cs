using System;
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using System.Security.Cryptography;

namespace Kvasir.Block.Crypto;

/// <summary>How a sector's number becomes its initialisation vector.</summary>
internal enum SectorIv
{
    /// <summary>Low 32 bits, little-endian.</summary>
    Plain,

    /// <summary>64 bits, little-endian.</summary>
    Plain64,

    /// <summary>The number, encrypted with a hash of the key.</summary>
    Essiv,
}

/// <summary>Encrypts disk sectors of 512 bytes in place. Immutable: any number of threads.</summary>
internal sealed class SectorCipher
{
    public const int SectorSize = 512;

    private readonly bool _xts;
    private readonly SectorIv _iv;
    private readonly BlockAlgorithm _data;
    private readonly BlockAlgorithm? _tweak;

    private SectorCipher(bool xts, SectorIv iv, BlockAlgorithm data, BlockAlgorithm? tweak)
    {
        _xts = xts;
        _iv = iv;
        _data = data;
        _tweak = tweak;
    }

    /// <summary>XTS (IEEE 1619): the key's halves are for data and tweak.</summary>
    public static SectorCipher Xts(ReadOnlySpan<byte> key, SectorIv iv, string cipher = "aes") =>
        new(true, iv, BlockAlgorithm.Create(cipher, key[..(key.Length / 2)]), BlockAlgorithm.Create(cipher, key[(key.Length / 2)..]));

    /// <summary>CBC; for ESSIV with the hash that makes the vector's key.</summary>
    public static SectorCipher Cbc(ReadOnlySpan<byte> key, SectorIv iv, HashAlgorithmName ivHash, string cipher = "aes") =>
        new(false, iv, BlockAlgorithm.Create(cipher, key), iv == SectorIv.Essiv ? BlockAlgorithm.Create(cipher, CryptographicOperations.HashData(ivHash, key)) : null);

    /// <summary>The cipher of qcow2's encryption method 1: AES-128-CBC with the passphrase itself as key, plain64 vectors.</summary>
    public static SectorCipher LegacyAes(ReadOnlySpan<byte> passphrase)
    {
        byte[] key = new byte[16];
        passphrase[..Math.Min(16, passphrase.Length)].CopyTo(key);
        return Cbc(key, SectorIv.Plain64, HashAlgorithmName.SHA256);
    }

    public void Encrypt(ulong sector, Span<byte> data)
    {
        for (; data.Length >= SectorSize; data = data[SectorSize..], sector++)
        {
            if (_xts)
                RunXts(sector, data[..SectorSize], encrypt: true);
            else
                EncryptCbc(sector, data[..SectorSize]);
        }
    }

    public void Decrypt(ulong sector, Span<byte> data)
    {
        for (; data.Length >= SectorSize; data = data[SectorSize..], sector++)
        {
            if (_xts)
                RunXts(sector, data[..SectorSize], encrypt: false);
            else
                DecryptCbc(sector, data[..SectorSize]);
        }
    }

    private void MakeIv(ulong sector, Span<byte> iv)
    {
        iv.Clear();
        if (_iv == SectorIv.Plain)
            BinaryPrimitives.WriteUInt32LittleEndian(iv, (uint)sector);
        else
            BinaryPrimitives.WriteUInt64LittleEndian(iv, sector);
        if (_iv == SectorIv.Essiv || _xts)
            _tweak!.EncryptBlocks(iv);
    }

    private void RunXts(ulong sector, Span<byte> data, bool encrypt)
    {
        Span<Vector128<byte>> tweaks = stackalloc Vector128<byte>[SectorSize / BlockAlgorithm.BlockSize];
        MakeIv(sector, MemoryMarshal.AsBytes(tweaks[..1]));
        ulong low = tweaks[0].AsUInt64().GetElement(0);
        ulong high = tweaks[0].AsUInt64().GetElement(1);
        Span<Vector128<byte>> blocks = MemoryMarshal.Cast<byte, Vector128<byte>>(data);
        for (int i = 0; i < tweaks.Length; i++)
        {
            Vector128<byte> tweak = Vector128.Create(low, high).AsByte();
            tweaks[i] = tweak;
            blocks[i] ^= tweak;
            // Times x in GF(2^128), least significant bit first (IEEE 1619, 5.2).
            ulong carry = (ulong)((long)high >> 63) & 0x87;
            high = (high << 1) | (low >> 63);
            low = (low << 1) ^ carry;
        }
        if (encrypt)
            _data.EncryptBlocks(data);
        else
            _data.DecryptBlocks(data);
        for (int i = 0; i < tweaks.Length; i++)
            blocks[i] ^= tweaks[i];
    }

    private void EncryptCbc(ulong sector, Span<byte> data)
    {
        Span<Vector128<byte>> iv = stackalloc Vector128<byte>[1];
        MakeIv(sector, MemoryMarshal.AsBytes(iv));
        Span<Vector128<byte>> blocks = MemoryMarshal.Cast<byte, Vector128<byte>>(data);
        Vector128<byte> previous = iv[0];
        for (int i = 0; i < blocks.Length; i++)
        {
            blocks[i] ^= previous;
            _data.EncryptBlocks(MemoryMarshal.AsBytes(blocks.Slice(i, 1)));
            previous = blocks[i];
        }
    }

    private void DecryptCbc(ulong sector, Span<byte> data)
    {
        Span<Vector128<byte>> before = stackalloc Vector128<byte>[(SectorSize / BlockAlgorithm.BlockSize) + 1];
        MakeIv(sector, MemoryMarshal.AsBytes(before[..1]));
        Span<Vector128<byte>> blocks = MemoryMarshal.Cast<byte, Vector128<byte>>(data);
        blocks.CopyTo(before[1..]);
        _data.DecryptBlocks(data);
        for (int i = 0; i < blocks.Length; i++)
            blocks[i] ^= before[i];
    }
}
