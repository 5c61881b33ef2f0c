using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Crypto;

/// <summary>What a new LUKS header is to be (qemu-img create's options for luks).</summary>
public sealed record LuksCreateOptions
{
    public ReadOnlyMemory<byte> Passphrase { get; init; }

    /// <summary>"aes", "serpent" or "twofish".</summary>
    public string Cipher { get; init; } = "aes";

    /// <summary>16, 24 or 32: the cipher's own key size; XTS takes two of them.</summary>
    public int CipherKeyBytes { get; init; } = 32;

    /// <summary>"xts" or "cbc".</summary>
    public string CipherMode { get; init; } = "xts";

    /// <summary>"plain64", "plain" or "essiv".</summary>
    public string IvGenerator { get; init; } = "plain64";

    public string IvHash { get; init; } = "sha256";

    /// <summary>"sha1", "sha256" or "sha512".</summary>
    public string Hash { get; init; } = "sha256";

    /// <summary>Time that trying one passphrase is to take, in milliseconds.</summary>
    public int IterationMilliseconds { get; init; } = 2000;
}

/// <summary>A key slot, as far as it is public.</summary>
public readonly record struct LuksSlot(bool Active, uint Iterations, uint Stripes, uint KeyOffset);

/// <summary>
/// A LUKS header, version 1 (LUKS1 On-Disk Format Specification 1.2.3). Holds no secrets; the master key lives only in the cipher
/// that <see cref="UnlockAsync"/> gives out.
/// </summary>
public sealed class LuksHeader
{
    public const int Slots = 8;

    private const int HeaderSize = 592;
    private const uint SlotActive = 0x00ac71f3;
    private const uint SlotFree = 0x0000dead;
    private const int DigestSize = 20;
    private const int SaltSize = 32;
    private const int StripesPerKey = 4000;
    private const int MinimumIterations = 1000;
    // All slots are tried in the worst case: a header that asks for more than a minute or two of work is refused.
    private const int MostIterations = 1 << 27;
    private const int SectorSize = 512;

    private readonly byte[] _raw;

    private LuksHeader(byte[] raw) => _raw = raw;

    private static ReadOnlySpan<byte> Magic => [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe];

    public string CipherName => Text(8, 32);

    public string CipherMode => Text(40, 32);

    public string HashName => Text(72, 32);

    /// <summary>Where the payload starts, in bytes from the header.</summary>
    public long PayloadOffset => BinaryPrimitives.ReadUInt32BigEndian(_raw.AsSpan(104)) * (long)SectorSize;

    public int KeyBytes => BinaryPrimitives.ReadInt32BigEndian(_raw.AsSpan(108));

    public uint MasterKeyIterations => BinaryPrimitives.ReadUInt32BigEndian(_raw.AsSpan(164));

    public string Uuid => Text(168, 40);

    public static bool Probe(ReadOnlySpan<byte> start) =>
        start.Length >= 8 && start[..6].SequenceEqual(Magic) && BinaryPrimitives.ReadUInt16BigEndian(start[6..]) == 1;

    /// <summary>Bytes that the header with all its key material takes before the payload.</summary>
    public static long HeaderBytes(LuksCreateOptions options) => SectorSize * (8L + (Slots * SlotSectors(MasterKeyBytes(options))));

    public LuksSlot Slot(int index)
    {
        ReadOnlySpan<byte> slot = _raw.AsSpan(208 + (index * 48), 48);
        return new LuksSlot(
            BinaryPrimitives.ReadUInt32BigEndian(slot) == SlotActive,
            BinaryPrimitives.ReadUInt32BigEndian(slot[4..]),
            BinaryPrimitives.ReadUInt32BigEndian(slot[44..]),
            BinaryPrimitives.ReadUInt32BigEndian(slot[40..]) * SectorSize);
    }

    /// <exception cref="BlockException">There is no header this code can trust.</exception>
    internal static async ValueTask<LuksHeader> ReadAsync(BlockNode file, long offset, long length, CancellationToken cancellation)
    {
        byte[] raw = new byte[HeaderSize];
        if (length < HeaderSize || offset + HeaderSize > file.Length + SectorSize)
            throw new BlockException("Volume is not in LUKS format");
        await file.ReadAsync(offset, raw, cancellation).ConfigureAwait(false);
        LuksHeader header = new(raw);
        if (!raw.AsSpan(0, 6).SequenceEqual(Magic))
            throw new BlockException("Volume is not in LUKS format");
        int version = BinaryPrimitives.ReadUInt16BigEndian(raw.AsSpan(6));
        if (version != 1)
            throw new BlockException($"LUKS version {version} is not supported", BlockErrno.NotSupported);
        if (!BlockAlgorithm.Has(header.CipherName))
            throw new BlockException($"Algorithm '{header.CipherName}' with key size {header.KeyBytes} bytes not supported", BlockErrno.NotSupported);
        if (header.KeyBytes is not (16 or 24 or 32 or 48 or 64))
            throw new BlockException($"LUKS key size {header.KeyBytes} is invalid");
        _ = header.Hash;
        for (int i = 0; i < Slots; i++)
        {
            LuksSlot slot = header.Slot(i);
            if (slot.Active && (slot.KeyOffset + header.MaterialBytes > length || slot.Iterations is 0 or > MostIterations))
                throw new BlockException($"Keyslot {i} is invalid: its key material is misplaced or its counts are out of range");
            header.CheckPlace(i);
        }
        long work = header.MasterKeyIterations;
        for (int i = 0; i < Slots; i++)
            work += header.Slot(i).Active ? (long)header.Slot(i).Iterations + header.MasterKeyIterations : 0;
        if (work > 2L * MostIterations)
            throw new BlockException("LUKS key slots ask for too many iterations: to unlock them would take minutes");
        if (header.MasterKeyIterations > MostIterations)
            throw new BlockException("LUKS master key digest iterations are out of range");
        return header;
    }

    /// <summary>Bytes of one slot's key material, in whole sectors.</summary>
    private int MaterialBytes => RoundToSector(KeyBytes * StripesPerKey);

    /// <summary>A slot's key material lies between the header and the payload and on no other slot's, in use or not: one that is free may be filled.</summary>
    private void CheckPlace(int index)
    {
        uint state = BinaryPrimitives.ReadUInt32BigEndian(_raw.AsSpan(208 + (index * 48)));
        if (state is not (SlotActive or SlotFree))
            throw new BlockException($"Keyslot {index} state (active/disable) is corrupted");
        LuksSlot slot = Slot(index);
        if (slot.Stripes != StripesPerKey)
            throw new BlockException($"Keyslot {index} is corrupted (stripes {slot.Stripes} != {StripesPerKey})");
        if (slot.KeyOffset < RoundToSector(HeaderSize))
            throw new BlockException($"Keyslot {index} is overlapping with the LUKS header");
        if (slot.KeyOffset + MaterialBytes > PayloadOffset)
            throw new BlockException($"Keyslot {index} is overlapping with the encrypted payload");
        for (int other = 0; other < index; other++)
        {
            if (Math.Abs(slot.KeyOffset - Slot(other).KeyOffset) < MaterialBytes)
                throw new BlockException($"Keyslots {other} and {index} are overlapping in the header");
        }
    }

    /// <summary>A header with a fresh master key, one slot in use.</summary>
    /// <returns>All bytes up to the payload.</returns>
    internal static byte[] Create(LuksCreateOptions options)
    {
        if (options.CipherMode is not ("xts" or "cbc") || options.CipherKeyBytes is not (16 or 24 or 32) || !BlockAlgorithm.Has(options.Cipher))
            throw new BlockException($"LUKS cipher '{options.Cipher}-{options.CipherKeyBytes * 8}' in mode '{options.CipherMode}' is not supported", BlockErrno.NotSupported);
        string mode = options.IvGenerator switch
        {
            "plain64" or "plain" => options.CipherMode + "-" + options.IvGenerator,
            "essiv" => options.CipherMode + "-essiv:" + options.IvHash,
            _ => throw new BlockException($"LUKS ivgen-alg '{options.IvGenerator}' is not supported", BlockErrno.NotSupported),
        };
        int keyBytes = MasterKeyBytes(options);
        byte[] all = new byte[HeaderBytes(options)];
        LuksHeader header = new(all);
        Magic.CopyTo(all);
        BinaryPrimitives.WriteUInt16BigEndian(all.AsSpan(6), 1);
        header.PutText(8, options.Cipher);
        header.PutText(40, mode);
        header.PutText(72, options.Hash);
        BinaryPrimitives.WriteUInt32BigEndian(all.AsSpan(104), (uint)(all.Length / SectorSize));
        BinaryPrimitives.WriteInt32BigEndian(all.AsSpan(108), keyBytes);
        header.PutText(168, Guid.NewGuid().ToString());
        for (int i = 0; i < Slots; i++)
        {
            Span<byte> slot = all.AsSpan(208 + (i * 48), 48);
            BinaryPrimitives.WriteUInt32BigEndian(slot, SlotFree);
            BinaryPrimitives.WriteUInt32BigEndian(slot[40..], (uint)(8 + (i * SlotSectors(keyBytes))));
            BinaryPrimitives.WriteUInt32BigEndian(slot[44..], StripesPerKey);
        }
        byte[] master = RandomNumberGenerator.GetBytes(keyBytes);
        try
        {
            int iterations = header.IterationsFor(Math.Max(1, options.IterationMilliseconds / 8), DigestSize);
            RandomNumberGenerator.Fill(all.AsSpan(132, SaltSize));
            BinaryPrimitives.WriteInt32BigEndian(all.AsSpan(164), iterations);
            Rfc2898DeriveBytes.Pbkdf2(master, all.AsSpan(132, SaltSize), all.AsSpan(112, DigestSize), iterations, header.Hash);
            header.FillSlot(all, 0, master, options.Passphrase.Span, options.IterationMilliseconds);
        }
        finally
        {
            CryptographicOperations.ZeroMemory(master);
        }
        return all;
    }

    /// <summary>Tries the passphrase on every slot and returns the payload's cipher.</summary>
    /// <exception cref="BlockException">No slot opens with it.</exception>
    internal async ValueTask<SectorCipher> UnlockAsync(BlockNode file, long offset, ReadOnlyMemory<byte> passphrase, CancellationToken cancellation)
    {
        (byte[] master, _) = await FindMasterKeyAsync(file, offset, passphrase, cancellation).ConfigureAwait(false)
            ?? throw new BlockException("Invalid password, cannot unlock any keyslot", BlockErrno.Perm);
        try
        {
            return CipherFor(master);
        }
        finally
        {
            CryptographicOperations.ZeroMemory(master);
        }
    }

    /// <summary>Adds a passphrase, given one that opens the volume.</summary>
    public async ValueTask AddSlotAsync(
        BlockNode file, long offset, ReadOnlyMemory<byte> existing, ReadOnlyMemory<byte> added, int? slot, int milliseconds, bool force = false, CancellationToken cancellation = default)
    {
        int target = slot ?? FreeSlot();
        if (target is < 0 or >= Slots)
            throw new BlockException(slot is null ? "Can't add a keyslot - all keyslots are in use" : $"Invalid keyslot {slot} specified, must be between 0 and {Slots - 1}");
        if (Slot(target).Active && !force)
            throw new BlockException($"Refusing to overwrite active keyslot {target} - please erase it first");
        (byte[] master, _) = await FindMasterKeyAsync(file, offset, existing, cancellation).ConfigureAwait(false)
            ?? throw new BlockException("Failed to retrieve the master key", BlockErrno.Perm);
        try
        {
            long material = Slot(target).KeyOffset;
            byte[] all = new byte[material + (StripesPerKey * (long)KeyBytes)];
            FillSlot(all, target, master, added.Span, milliseconds);
            int length = RoundToSector(StripesPerKey * KeyBytes);
            byte[] padded = new byte[length];
            all.AsSpan((int)material).CopyTo(padded);
            // Key material first: a slot is never marked in use before it opens.
            await file.WriteAsync(offset + material, padded, WriteFlags.None, cancellation).ConfigureAwait(false);
            await file.FlushAsync(cancellation).ConfigureAwait(false);
            await WriteHeaderAsync(file, offset, cancellation).ConfigureAwait(false);
        }
        finally
        {
            CryptographicOperations.ZeroMemory(master);
        }
    }

    /// <summary>Erases the slots a passphrase opens, or a given one. The last slot in use is only erased with <paramref name="force"/>.</summary>
    public async ValueTask EraseSlotsAsync(
        BlockNode file, long offset, ReadOnlyMemory<byte>? passphrase, int? slot, bool force, CancellationToken cancellation = default)
    {
        if (slot is < 0 or >= Slots)
            throw new BlockException($"Invalid keyslot {slot} specified, must be between 0 and {Slots - 1}");
        int active = 0;
        List<int> chosen = [];
        for (int i = 0; i < Slots; i++)
        {
            if (!Slot(i).Active)
                continue;
            active++;
            if (slot is int only && i != only)
                continue;
            if (passphrase is ReadOnlyMemory<byte> secret && !await OpensAsync(file, offset, i, secret, cancellation).ConfigureAwait(false))
            {
                if (slot is not null)
                    throw new BlockException($"Given keyslot {i} doesn't contain the given old password for erase operation");
                continue;
            }
            chosen.Add(i);
        }
        // All is decided before anything is erased: what is refused changes nothing.
        if (chosen.Count == 0)
            throw new BlockException(slot is int index ? $"Given keyslot {index} is already erased (inactive) " : "No keyslots match given (old) password for erase operation");
        if (chosen.Count == active && !force)
        {
            throw new BlockException(slot is int last
                ? $"Attempt to erase the only active keyslot {last} which will erase all the data in the image irreversibly - refusing operation"
                : "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation");
        }
        foreach (int i in chosen)
            await EraseSlotAsync(file, offset, i, cancellation).ConfigureAwait(false);
    }

    private static long SlotSectors(int keyBytes) => ((((long)keyBytes * StripesPerKey) + SectorSize - 1) / SectorSize + 7) / 8 * 8;

    private static int MasterKeyBytes(LuksCreateOptions options) => options.CipherMode == "xts" ? options.CipherKeyBytes * 2 : options.CipherKeyBytes;

    private static int RoundToSector(int length) => (length + SectorSize - 1) / SectorSize * SectorSize;

    private HashAlgorithmName Hash => HashByName(HashName);

    private static HashAlgorithmName HashByName(string name) => name switch
    {
        "sha1" => HashAlgorithmName.SHA1,
        "sha256" => HashAlgorithmName.SHA256,
        "sha384" => HashAlgorithmName.SHA384,
        "sha512" => HashAlgorithmName.SHA512,
        _ => throw new BlockException($"LUKS hash algorithm '{name}' is not supported", BlockErrno.NotSupported),
    };

    private SectorCipher CipherFor(ReadOnlySpan<byte> master)
    {
        string[] parts = CipherMode.Split('-', 2);
        string generator = parts.Length > 1 ? parts[1] : string.Empty;
        SectorIv iv = generator switch
        {
            "plain" => SectorIv.Plain,
            "plain64" => SectorIv.Plain64,
            _ when generator.StartsWith("essiv:", StringComparison.Ordinal) => SectorIv.Essiv,
            _ => throw new BlockException($"LUKS cipher mode '{CipherMode}' is not supported", BlockErrno.NotSupported),
        };
        return parts[0] switch
        {
            "xts" when iv != SectorIv.Essiv && master.Length is 32 or 48 or 64 => SectorCipher.Xts(master, iv, CipherName),
            "cbc" when master.Length <= 32 => SectorCipher.Cbc(master, iv, iv == SectorIv.Essiv ? HashByName(generator[6..]) : HashAlgorithmName.SHA256, CipherName),
            _ => throw new BlockException($"LUKS cipher mode '{CipherMode}' is not supported", BlockErrno.NotSupported),
        };
    }

    private async ValueTask<(byte[] Key, int Slot)?> FindMasterKeyAsync(BlockNode file, long offset, ReadOnlyMemory<byte> passphrase, CancellationToken cancellation)
    {
        for (int i = 0; i < Slots; i++)
        {
            if (Slot(i).Active && await TrySlotAsync(file, offset, i, passphrase, cancellation).ConfigureAwait(false) is byte[] key)
                return (key, i);
        }
        return null;
    }

    private async ValueTask<bool> OpensAsync(BlockNode file, long offset, int index, ReadOnlyMemory<byte> passphrase, CancellationToken cancellation)
    {
        byte[]? master = await TrySlotAsync(file, offset, index, passphrase, cancellation).ConfigureAwait(false);
        CryptographicOperations.ZeroMemory(master);
        return master is not null;
    }

    private async ValueTask<byte[]?> TrySlotAsync(BlockNode file, long offset, int index, ReadOnlyMemory<byte> passphrase, CancellationToken cancellation)
    {
        LuksSlot slot = Slot(index);
        byte[] material = new byte[RoundToSector(KeyBytes * (int)slot.Stripes)];
        await file.ReadAsync(offset + slot.KeyOffset, material, cancellation).ConfigureAwait(false);
        byte[] slotKey = new byte[KeyBytes];
        Rfc2898DeriveBytes.Pbkdf2(passphrase.Span, SlotSalt(index), slotKey, (int)Math.Max(1, slot.Iterations), Hash);
        CipherFor(slotKey).Decrypt(0, material);
        byte[] master = Merge(material.AsSpan(0, KeyBytes * (int)slot.Stripes), (int)slot.Stripes);
        byte[] digest = new byte[DigestSize];
        Rfc2898DeriveBytes.Pbkdf2(master, _raw.AsSpan(132, SaltSize), digest, (int)Math.Max(1, MasterKeyIterations), Hash);
        CryptographicOperations.ZeroMemory(slotKey);
        CryptographicOperations.ZeroMemory(material);
        if (CryptographicOperations.FixedTimeEquals(digest, _raw.AsSpan(112, DigestSize)))
            return master;
        CryptographicOperations.ZeroMemory(master);
        return null;
    }

    private Span<byte> SlotSalt(int index) => _raw.AsSpan(208 + (index * 48) + 8, SaltSize);

    private int FreeSlot()
    {
        for (int i = 0; i < Slots; i++)
        {
            if (!Slot(i).Active)
                return i;
        }
        return -1;
    }

    private void FillSlot(byte[] all, int index, ReadOnlySpan<byte> master, ReadOnlySpan<byte> passphrase, int milliseconds)
    {
        int iterations = IterationsFor(milliseconds, master.Length);
        Span<byte> slot = _raw.AsSpan(208 + (index * 48), 48);
        BinaryPrimitives.WriteUInt32BigEndian(slot, SlotActive);
        BinaryPrimitives.WriteInt32BigEndian(slot[4..], iterations);
        RandomNumberGenerator.Fill(slot.Slice(8, SaltSize));
        byte[] slotKey = new byte[master.Length];
        Rfc2898DeriveBytes.Pbkdf2(passphrase, slot.Slice(8, SaltSize), slotKey, iterations, Hash);
        byte[] split = new byte[RoundToSector(master.Length * StripesPerKey)];
        Split(master, split.AsSpan(0, master.Length * StripesPerKey));
        CipherFor(slotKey).Encrypt(0, split);
        split.AsSpan(0, master.Length * StripesPerKey).CopyTo(all.AsSpan((int)Slot(index).KeyOffset));
        CryptographicOperations.ZeroMemory(slotKey);
    }

    private async ValueTask EraseSlotAsync(BlockNode file, long offset, int index, CancellationToken cancellation)
    {
        LuksSlot slot = Slot(index);
        Span<byte> entry = _raw.AsSpan(208 + (index * 48), 48);
        BinaryPrimitives.WriteUInt32BigEndian(entry, SlotFree);
        BinaryPrimitives.WriteUInt32BigEndian(entry[4..], 0);
        entry.Slice(8, SaltSize).Clear();
        await WriteHeaderAsync(file, offset, cancellation).ConfigureAwait(false);
        byte[] noise = new byte[RoundToSector(KeyBytes * StripesPerKey)];
        for (int pass = 0; pass < 2; pass++)
        {
            RandomNumberGenerator.Fill(noise);
            await file.WriteAsync(offset + slot.KeyOffset, noise, WriteFlags.None, cancellation).ConfigureAwait(false);
            await file.FlushAsync(cancellation).ConfigureAwait(false);
        }
    }

    private async ValueTask WriteHeaderAsync(BlockNode file, long offset, CancellationToken cancellation)
    {
        await file.WriteAsync(offset, _raw.AsMemory(0, HeaderSize), WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.FlushAsync(cancellation).ConfigureAwait(false);
    }

    private int IterationsFor(int milliseconds, int outputBytes)
    {
        byte[] output = new byte[outputBytes];
        byte[] salt = new byte[SaltSize];
        int iterations = 10_000;
        while (true)
        {
            long start = Stopwatch.GetTimestamp();
            Rfc2898DeriveBytes.Pbkdf2("benchmark"u8, salt, output, iterations, Hash);
            double spent = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
            if (spent >= 5 || iterations > 10_000_000)
                return (int)Math.Clamp(iterations * (milliseconds / Math.Max(spent, 0.01)), MinimumIterations, MostIterations);
            iterations *= 4;
        }
    }

    /// <summary>Anti-forensic split (LUKS1 specification, chapter 2.4).</summary>
    private void Split(ReadOnlySpan<byte> key, Span<byte> stripes)
    {
        int size = key.Length;
        byte[] block = new byte[size];
        int count = stripes.Length / size;
        for (int i = 0; i < count - 1; i++)
        {
            Span<byte> stripe = stripes.Slice(i * size, size);
            RandomNumberGenerator.Fill(stripe);
            Mix(block, stripe);
            Diffuse(block);
        }
        Span<byte> last = stripes[^size..];
        key.CopyTo(last);
        Mix(last, block);
    }

    private byte[] Merge(ReadOnlySpan<byte> stripes, int count)
    {
        int size = stripes.Length / count;
        byte[] block = new byte[size];
        for (int i = 0; i < count - 1; i++)
        {
            Mix(block, stripes.Slice(i * size, size));
            Diffuse(block);
        }
        Mix(block, stripes[^size..]);
        return block;
    }

    private static void Mix(Span<byte> target, ReadOnlySpan<byte> source)
    {
        for (int i = 0; i < target.Length; i++)
            target[i] ^= source[i];
    }

    private void Diffuse(Span<byte> block)
    {
        Span<byte> input = stackalloc byte[4 + 64];
        Span<byte> digest = stackalloc byte[64];
        uint index = 0;
        HashAlgorithmName hash = Hash;
        for (int at = 0; at < block.Length; index++)
        {
            int size = hash == HashAlgorithmName.SHA1 ? 20 : hash == HashAlgorithmName.SHA256 ? 32 : hash == HashAlgorithmName.SHA384 ? 48 : 64;
            int part = Math.Min(size, block.Length - at);
            BinaryPrimitives.WriteUInt32BigEndian(input, index);
            block.Slice(at, part).CopyTo(input[4..]);
            _ = CryptographicOperations.HashData(hash, input[..(4 + part)], digest);
            digest[..part].CopyTo(block[at..]);
            at += part;
        }
    }

    private string Text(int offset, int length)
    {
        ReadOnlySpan<byte> field = _raw.AsSpan(offset, length);
        int end = field.IndexOf((byte)0);
        return Encoding.ASCII.GetString(end < 0 ? field : field[..end]);
    }

    private void PutText(int offset, string text) => Encoding.ASCII.GetBytes(text, _raw.AsSpan(offset));
}
