using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Linux;
using ZstdSharp;

namespace Kvasir.Block.Qcow2;

/// <summary>Compresses and expands single clusters. Any number of threads; each borrows one of a few reused engines.</summary>
internal sealed class Qcow2Codec(Qcow2Compression type) : IDisposable
{
    // Readers expand zlib clusters with a window of 4 KiB (docs/interop/qcow2.txt, "Compressed Clusters Descriptor").
    private const int WindowBits = 12;
    private const uint ZstdMagic = 0xfd2fb528;

    private readonly Lock _lock = new();
    private readonly Stack<Deflate> _deflaters = new();
    private readonly Stack<Deflate> _inflaters = new();
    private readonly Stack<Compressor> _compressors = new();
    private readonly Stack<Compressor> _probes = new();
    private readonly Stack<Decompressor> _decompressors = new();

    /// <summary>Compresses a cluster; -1 when the result does not fit the target.</summary>
    public int Compress(ReadOnlySpan<byte> cluster, Span<byte> target)
    {
        if (LooksRandom(cluster) && !FastFits(cluster, target))
            return -1;
        if (type == Qcow2Compression.Zlib)
        {
            Deflate deflate = Borrow(_deflaters) ?? new Deflate(compress: true, WindowBits);
            int size = deflate.Run(cluster, target);
            Return(_deflaters, deflate);
            return size;
        }
        Compressor compressor = Borrow(_compressors) ?? new Compressor(1);
        bool fits = compressor.TryWrap(cluster, target, out int written);
        Return(_compressors, compressor);
        return fits ? written : -1;
    }

    /// <summary>Expands a cluster. False: the data is damaged.</summary>
    public bool Expand(ReadOnlySpan<byte> data, Span<byte> cluster)
    {
        if (type == Qcow2Compression.Zlib)
        {
            Deflate inflate = Borrow(_inflaters) ?? new Deflate(compress: false, WindowBits);
            int size = inflate.Run(data, cluster);
            Return(_inflaters, inflate);
            return size == cluster.Length;
        }
        int frame = ZstdFrameLength(data);
        if (frame < 0)
            return false;
        Decompressor decompressor = Borrow(_decompressors) ?? new Decompressor();
        bool good;
        try
        {
            good = decompressor.TryUnwrap(data[..frame], cluster, out int written) && written == cluster.Length;
        }
        catch (ZstdException)
        {
            good = false;
        }
        Return(_decompressors, decompressor);
        return good;
    }

    public void Dispose()
    {
        lock (_lock)
        {
            foreach (Deflate engine in _deflaters)
                engine.Dispose();
            foreach (Deflate engine in _inflaters)
                engine.Dispose();
            foreach (Compressor engine in _compressors)
                engine.Dispose();
            foreach (Decompressor engine in _decompressors)
                engine.Dispose();
            foreach (Compressor engine in _probes)
                engine.Dispose();
            _probes.Clear();
            _deflaters.Clear();
            _inflaters.Clear();
            _compressors.Clear();
            _decompressors.Clear();
        }
    }

    /// <summary>Length of the zstd frame that data starts with (RFC 8878, 3.1.1): what follows is padding. -1: no whole frame.</summary>
    internal static int ZstdFrameLength(ReadOnlySpan<byte> data)
    {
        if (data.Length < 6 || BinaryPrimitives.ReadUInt32LittleEndian(data) != ZstdMagic)
            return -1;
        byte descriptor = data[4];
        bool singleSegment = (descriptor & 0x20) != 0;
        int dictionaryId = (descriptor & 3) switch { 0 => 0, 1 => 1, 2 => 2, _ => 4 };
        int contentSize = (descriptor >> 6) switch { 0 => singleSegment ? 1 : 0, 1 => 2, 2 => 4, _ => 8 };
        int position = 5 + (singleSegment ? 0 : 1) + dictionaryId + contentSize;
        while (position + 3 <= data.Length)
        {
            int header = data[position] | (data[position + 1] << 8) | (data[position + 2] << 16);
            int type = (header >> 1) & 3;
            position += 3 + (type == 1 ? 1 : header >> 3);
            if ((header & 1) == 0)
                continue;
            position += (descriptor & 4) != 0 ? 4 : 0;
            return position <= data.Length ? position : -1;
        }
        return -1;
    }

    /// <summary>Whether all byte values are about as frequent: then a quick attempt is worth its time, as the real one is likely lost.</summary>
    private static bool LooksRandom(ReadOnlySpan<byte> cluster)
    {
        if (cluster.Length < 16384)
            return false;
        Span<int> counts = stackalloc int[256];
        counts.Clear();
        foreach (byte value in cluster[..16384])
            counts[value]++;
        // Of random bytes each value comes 64 times, give or take 8; the sum of squared distances is about 16384.
        long distance = 0;
        foreach (int count in counts)
            distance += (long)(count - 64) * (count - 64);
        return distance < 32768;
    }

    /// <summary>Whether the fastest level makes a cluster any shorter.</summary>
    private bool FastFits(ReadOnlySpan<byte> cluster, Span<byte> target)
    {
        Compressor compressor = Borrow(_probes) ?? new Compressor(-5);
        bool fits = compressor.TryWrap(cluster, target, out _);
        Return(_probes, compressor);
        return fits;
    }

    private T? Borrow<T>(Stack<T> pool)
        where T : class
    {
        lock (_lock)
            return pool.TryPop(out T? engine) ? engine : null;
    }

    private void Return<T>(Stack<T> pool, T engine)
        where T : class
    {
        lock (_lock)
            pool.Push(engine);
    }
}
