using System;

namespace Kvasir.Block.Crypto;

/// <summary>A block cipher of 16 bytes with its key. Immutable: any number of threads.</summary>
internal abstract class BlockAlgorithm
{
    public const int BlockSize = 16;

    /// <summary>Whether LUKS volumes of this cipher (cryptsetup's name) can be read and made.</summary>
    public static bool Has(string name) => name is "aes" or "serpent" or "twofish";

    public static BlockAlgorithm Create(string name, ReadOnlySpan<byte> key) => name == "aes" ? new AesCore(key) : new LibraryCipher(name, key);

    /// <summary>Encrypts whole blocks in place, each by itself.</summary>
    public abstract void EncryptBlocks(Span<byte> data);

    /// <summary>Decrypts whole blocks in place, each by itself.</summary>
    public abstract void DecryptBlocks(Span<byte> data);
}
