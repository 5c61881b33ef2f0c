using System;
using System.Buffers.Binary;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>A differencing VHD ("Virtual Hard Disk Image Format Specification", 1.0): a dynamic one whose blocks' bitmaps say which sectors are its own.</summary>
public sealed class VpcDifferencing : DifferencingImage, IIdentifiedImage
{
    private const uint TypeDifferencing = 4;
    private const int Sector = 512;
    private const int ParentIdAt = 40;
    private const int ParentNameAt = 64;
    private const int ParentNameBytes = 512;
    private const int LocatorsAt = 576;
    private const int LocatorBytes = 24;
    private const int Locators = 8;
    private const int LargestLocator = 64 << 10;
    private const uint WindowsRelative = 0x5732_7275;
    private const uint WindowsAbsolute = 0x5732_6b75;
    private const uint MacAddress = 0x4d61_6358;

    private readonly byte[] _footer;
    private readonly uint[] _table;
    private readonly int _bitmapBytes;

    private VpcDifferencing(BlockNode file, byte[] footer, int blockSize, uint[] table, string parent, Guid parentId)
        : base(file, "vpc", blockSize, Sector, parent, [parentId])
    {
        _footer = footer;
        _table = table;
        _bitmapBytes = VpcImage.BitmapBytes(blockSize);
    }

    public override long Length => VpcImage.SizeOf(_footer);

    Guid IIdentifiedImage.Id => VpcImage.IdOf(_footer);

    /// <summary>Opens a VHD of any type.</summary>
    /// <exception cref="BlockException">The image is damaged or of an unknown kind, or a differencing one is to be written.</exception>
    public static async ValueTask<BlockNode> OpenAnyAsync(BlockNode file, bool readOnly, CancellationToken cancellation)
    {
        byte[] footer = await VpcImage.ReadFooterAsync(file, cancellation).ConfigureAwait(false);
        if (VpcImage.TypeOf(footer) != TypeDifferencing)
            return await VpcImage.OpenAsync(file, cancellation).ConfigureAwait(false);
        if (!readOnly)
            throw new BlockException("Differencing VHDs can only be read: convert it, or make a qcow2 overlay over it", BlockErrno.ReadOnly);
        (byte[] header, int blockSize, uint[] table, _) = await VpcImage.LoadTableAsync(file, footer, cancellation).ConfigureAwait(false);
        Guid parentId = new(header.AsSpan(ParentIdAt, 16), bigEndian: true);
        ParentSearch search = new();
        for (int i = 0; i < Locators; i++)
            await AddLocatorAsync(search, file, header.AsMemory(LocatorsAt + (i * LocatorBytes), LocatorBytes), cancellation).ConfigureAwait(false);
        string name = Encoding.BigEndianUnicode.GetString(header, ParentNameAt, ParentNameBytes);
        search.Add(name.IndexOf('\0', StringComparison.Ordinal) is int end and >= 0 ? name[..end] : name);
        string parent = await search.FindAsync(
            file,
            async candidate => VpcImage.IdOf(await VpcImage.ReadFooterAsync(candidate, cancellation).ConfigureAwait(false)) == parentId).ConfigureAwait(false);
        return new VpcDifferencing(file, footer, blockSize, table, parent, parentId);
    }

    private protected override (DifferencingState State, long Host, long Bitmap) Locate(long block)
    {
        uint entry = _table[block];
        return entry == VpcImage.Absent ? (DifferencingState.Parent, 0, 0) : (DifferencingState.Partial, (entry * 512L) + _bitmapBytes, entry * 512L);
    }

    // The first sector's bit is the first byte's highest.
    private protected override bool IsOwn(byte[] bitmap, int sector) => (bitmap[sector / 8] & (0x80 >> (sector % 8))) != 0;

    private static async ValueTask AddLocatorAsync(ParentSearch search, BlockNode file, ReadOnlyMemory<byte> locator, CancellationToken cancellation)
    {
        uint platform = BinaryPrimitives.ReadUInt32BigEndian(locator.Span);
        uint length = BinaryPrimitives.ReadUInt32BigEndian(locator.Span[8..]);
        long offset = BinaryPrimitives.ReadInt64BigEndian(locator.Span[16..]);
        if (platform is not (WindowsRelative or WindowsAbsolute or MacAddress) || length == 0)
            return;
        if (length > LargestLocator || offset < 0 || offset > file.Length - length)
            throw new BlockException("A parent locator of the VHD is too long or outside the file");
        byte[] text = new byte[length];
        await file.ReadAsync(offset, text, cancellation).ConfigureAwait(false);
        search.Add((platform == MacAddress ? Encoding.UTF8 : Encoding.Unicode).GetString(text));
    }
}
