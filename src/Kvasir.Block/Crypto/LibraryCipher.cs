using System;
using System.Collections.Concurrent;
using Org.BouncyCastle.Crypto;
using Org.BouncyCastle.Crypto.Engines;
using Org.BouncyCastle.Crypto.Parameters;

namespace Kvasir.Block.Crypto;

/// <summary>Serpent and Twofish, from Bouncy Castle. Its engines keep the block at work in themselves: each is with one caller at a time.</summary>
internal sealed class LibraryCipher : BlockAlgorithm
{
    private readonly ConcurrentBag<IBlockCipher> _encrypt = [];
    private readonly ConcurrentBag<IBlockCipher> _decrypt = [];
    private readonly string _name;
    private readonly KeyParameter _key;

    public LibraryCipher(string name, ReadOnlySpan<byte> key)
    {
        if (key.Length is not (16 or 24 or 32))
            throw new BlockException($"Keys of {name} have 16, 24 or 32 bytes, not {key.Length}");
        _name = name;
        _key = new KeyParameter(key);
    }

    public override void EncryptBlocks(Span<byte> data) => Run(_encrypt, encrypt: true, data);

    public override void DecryptBlocks(Span<byte> data) => Run(_decrypt, encrypt: false, data);

    private void Run(ConcurrentBag<IBlockCipher> idle, bool encrypt, Span<byte> data)
    {
        if (!idle.TryTake(out IBlockCipher? engine))
        {
            engine = _name == "serpent" ? new SerpentEngine() : new TwofishEngine();
            engine.Init(encrypt, _key);
        }
        for (; data.Length >= BlockSize; data = data[BlockSize..])
            engine.ProcessBlock(data[..BlockSize], data[..BlockSize]);
        idle.Add(engine);
    }
}
