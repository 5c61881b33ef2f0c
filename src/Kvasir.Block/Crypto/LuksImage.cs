using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Crypto;

/// <summary>A plain LUKS volume: the header, then the encrypted disk.</summary>
public sealed class LuksImage : BlockNode
{
    private const int LargestPart = 1 << 20;

    private readonly SectorCipher? _cipher;

    private LuksImage(BlockNode file, LuksHeader header, SectorCipher? cipher)
    {
        File = file;
        Header = header;
        _cipher = cipher;
    }

    public override string Driver => "luks";

    public override BlockNode File { get; }

    public LuksHeader Header { get; }

    public override long Length => Math.Max(0, File.Length - Header.PayloadOffset);

    public override int RequestAlignment => SectorCipher.SectorSize;

    public override bool HasFastZero => false;

    private SectorCipher Cipher => _cipher ?? throw new BlockException("Parameter 'key-secret' is required for cipher", BlockErrno.Access);

    /// <param name="file">The volume; owned once this returns.</param>
    /// <param name="passphrase">Opens it; null: only the header can be looked at.</param>
    /// <param name="cancellation">Ends the opening early.</param>
    /// <exception cref="BlockException">No LUKS volume, or a wrong passphrase.</exception>
    public static async ValueTask<LuksImage> OpenAsync(BlockNode file, ReadOnlyMemory<byte>? passphrase, CancellationToken cancellation = default)
    {
        LuksHeader header = await LuksHeader.ReadAsync(file, 0, file.Length, cancellation).ConfigureAwait(false);
        SectorCipher? cipher = passphrase is ReadOnlyMemory<byte> secret ? await header.UnlockAsync(file, 0, secret, cancellation).ConfigureAwait(false) : null;
        return new LuksImage(file, header, cipher);
    }

    public static async ValueTask<LuksImage> CreateAsync(
        BlockNode file, long size, LuksCreateOptions options, Preallocation preallocation, CancellationToken cancellation = default)
    {
        byte[] header = LuksHeader.Create(options);
        await file.ResizeAsync(checked(size + header.Length), preallocation == Preallocation.Metadata ? Preallocation.Off : preallocation, cancellation).ConfigureAwait(false);
        await file.WriteAsync(0, header, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.FlushAsync(cancellation).ConfigureAwait(false);
        return await OpenAsync(file, options.Passphrase, cancellation).ConfigureAwait(false);
    }

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        File.ResizeAsync(checked(length + Header.PayloadOffset), preallocation, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await File.ReadAsync(offset + Header.PayloadOffset, buffer, cancellation).ConfigureAwait(false);
        Cipher.Decrypt((ulong)offset / SectorCipher.SectorSize, buffer.Span);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        if ((flags & WriteFlags.Compressed) != 0)
            throw new BlockException("Compression not supported for this file format", BlockErrno.NotSupported);
        SectorCipher cipher = Cipher;
        using AlignedBuffer secret = AlignedBuffer.Rent(Math.Min(buffer.Length, LargestPart));
        while (!buffer.IsEmpty)
        {
            Memory<byte> part = secret.Memory[..Math.Min(buffer.Length, LargestPart)];
            buffer.Span[..part.Length].CopyTo(part.Span);
            cipher.Encrypt((ulong)offset / SectorCipher.SectorSize, part.Span);
            await File.WriteAsync(offset + Header.PayloadOffset, part, flags, cancellation).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }
}
