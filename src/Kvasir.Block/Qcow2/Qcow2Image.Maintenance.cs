using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;

namespace Kvasir.Block.Qcow2;

/// <summary>What check, amend and the bitmap commands need of an image.</summary>
public sealed partial class Qcow2Image
{
    internal long SnapshotTableBytes => SerializeSnapshots(_snapshots).Length;

    /// <summary>Whether a persistent bitmap records what is written.</summary>
    public bool IsRecording => _tracker is not null;

    internal AsyncMutex MetadataLock => _lock;

    internal RefcountTable Refcounts => _refcounts;

    /// <summary>Checks the image and repairs what is asked for. The caller drains guest requests first.</summary>
    public ValueTask<CheckResult> CheckAsync(CheckRepair repair = CheckRepair.None, Action<string>? report = null, CancellationToken cancellation = default) =>
        Qcow2Check.RunAsync(this, repair, report, cancellation);

    /// <summary>Turns lazy reference counts on or off (amend).</summary>
    public async ValueTask SetLazyRefcountsAsync(bool lazy, CancellationToken cancellation = default)
    {
        if (lazy && _header.Version < 3)
            throw new BlockException("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)");
        await FlushAsync(cancellation).ConfigureAwait(false);
        _header.Compatible = lazy ? _header.Compatible | Qcow2Compatible.LazyRefcounts : _header.Compatible & ~Qcow2Compatible.LazyRefcounts;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Changes the name under which the external data file is looked for (amend data_file=); empty: it must be given at each opening.</summary>
    public async ValueTask SetDataFileNameAsync(string name, CancellationToken cancellation = default)
    {
        if (_dataFile is null)
            throw new BlockException("data-file can only be set for images that use an external data file");
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            _header.DataFile = name.Length == 0 ? null : name;
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>Says whether the external data file is to stay readable as a raw image (amend; only ever switched off).</summary>
    public async ValueTask SetDataFileRawAsync(bool raw, CancellationToken cancellation = default)
    {
        if (raw && !DataFileIsRaw)
            throw new BlockException("data-file-raw cannot be set on existing images");
        if (!raw)
            _header.Autoclear &= ~Qcow2Autoclear.DataFileRaw;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Changes the format version (amend compat=).</summary>
    public async ValueTask SetVersionAsync(int version, CancellationToken cancellation = default)
    {
        if (version == _header.Version)
            return;
        if (version < 3)
        {
            if (_header.RefcountOrder != 4)
                throw new BlockException("compat=0.10 requires refcount_bits=16", BlockErrno.NotSupported);
            if (_dataFile is not null || _header.HasExtendedL2 || _header.Compression != Qcow2Compression.Zlib)
                throw new BlockException($"Cannot downgrade an image with incompatible features 0x{(ulong)_header.Incompatible:x} set", BlockErrno.NotSupported);
            foreach (Qcow2Snapshot snapshot in _snapshots)
            {
                if (snapshot.VmStateSize != 0 || snapshot.DiskSize != Length)
                    throw new BlockException("Internal snapshots prevent downgrade of image", BlockErrno.NotSupported);
            }
            await ZeroClustersToDataAsync(cancellation).ConfigureAwait(false);
            _header.Autoclear = Qcow2Autoclear.None;
            _header.Compatible = Qcow2Compatible.None;
            _header.Incompatible = Qcow2Incompatible.None;
            _header.BitmapCount = 0;
        }
        await FlushAsync(cancellation).ConfigureAwait(false);
        _header.Version = version;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Gives an empty image a LUKS header of its own.</summary>
    internal async ValueTask FormatLuksAsync(LuksCreateOptions options, CancellationToken cancellation)
    {
        byte[] header = LuksHeader.Create(options);
        long clusters = (header.Length + _clusterSize - 1) >> _clusterBits;
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            long offset = await _refcounts.AllocateAsync(clusters, cancellation).ConfigureAwait(false);
            byte[] padded = new byte[clusters << _clusterBits];
            header.CopyTo(padded, 0);
            await _file.WriteAsync(offset, padded, WriteFlags.None, cancellation).ConfigureAwait(false);
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            _header.CryptoOffset = offset;
            _header.CryptoLength = header.Length;
            _header.Encryption = Qcow2Encryption.Luks;
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>Writes everything back and lets go of the file without closing it.</summary>
    internal async ValueTask CloseKeepingFileAsync()
    {
        await CloseTablesAsync().ConfigureAwait(false);
        _closed = true;
        _codec.Dispose();
    }

    internal async ValueTask FlushForCheckAsync(CancellationToken cancellation)
    {
        if (IsReadOnly || _corrupt)
            return;
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await FlushAllAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>A fresh look at the stored counts, past this image's own cache.</summary>
    internal async ValueTask<RefcountTable> LoadRefcountsAsync(CancellationToken cancellation)
    {
        ulong[] table = await RefcountTable.LoadTableAsync(_file, _header, cancellation).ConfigureAwait(false);
        return new RefcountTable(_file, _header, table, 8 << 20) { Tolerant = true };
    }

    internal async ValueTask StoreRepairedRefcountsAsync(RefcountTable repaired, CancellationToken cancellation)
    {
        await repaired.WriteBlocksAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        if (repaired.HasNewBlocks && await repaired.WriteTableAsync(cancellation).ConfigureAwait(false))
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Reads all tables again after a repair changed them on disk.</summary>
    internal async ValueTask ReloadTablesAsync(CancellationToken cancellation)
    {
        _l2Cache.Clear();
        _dirtyL1.Clear();
        _l1 = await LoadL1Async(_file, _header.L1Offset, _header.L1Size, cancellation).ConfigureAwait(false);
        ulong[] table = await RefcountTable.LoadTableAsync(_file, _header, cancellation).ConfigureAwait(false);
        _refcounts = new RefcountTable(_file, _header, table, _options.RefcountCacheBytes);
        RegisterMetadata();
    }

    internal async ValueTask ClearTroubleBitsAsync(CancellationToken cancellation)
    {
        if (IsReadOnly || (_header.Incompatible & (Qcow2Incompatible.Dirty | Qcow2Incompatible.Corrupt)) == 0)
            return;
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        _header.Incompatible &= ~(Qcow2Incompatible.Dirty | Qcow2Incompatible.Corrupt);
        _corrupt = false;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Version 2 has no zero clusters: each becomes plain data, or nothing at all where nothing lies below.</summary>
    private async ValueTask ZeroClustersToDataAsync(CancellationToken cancellation)
    {
        for (long offset = 0; offset < Length;)
        {
            Mapping mapping;
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                mapping = await FindAsync(offset, Length - offset, cancellation).ConfigureAwait(false);
            }
            finally
            {
                _lock.Exit();
            }
            if (mapping.Kind is Kind.Zero or Kind.ZeroReserved)
            {
                if (_backing is null)
                    await DropClustersAsync(offset, (offset + mapping.Length + _clusterSize - 1) & ~(_clusterSize - 1L), DropMode.Forget, cancellation).ConfigureAwait(false);
                else
                    await WriteZeroDataAsync(offset, mapping.Length, ZeroFlags.None, cancellation).ConfigureAwait(false);
            }
            offset += mapping.Length;
        }
    }
}
