using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

/// <summary>
/// Keeps an image's recording bitmaps up with the guest's writes. Before the first one each bitmap is marked "in use" in the file, where
/// it stays so until the image is closed: after a crash it does not pretend to know what was written (docs/interop/qcow2.txt, "Bitmaps").
/// </summary>
internal sealed class Qcow2BitmapTracker
{
    private readonly Qcow2Image _image;
    private readonly Lock _lock = new();
    private readonly AsyncMutex _starting = new();
    private readonly List<(Qcow2BitmapInfo Info, byte[] Bits)> _bitmaps = [];
    private readonly List<Qcow2BitmapInfo> _recording;
    private bool _started;

    private Qcow2BitmapTracker(Qcow2Image image, List<Qcow2BitmapInfo> recording)
    {
        _image = image;
        _recording = recording;
    }

    /// <summary>A tracker, if the image has a bitmap that records.</summary>
    public static async ValueTask<Qcow2BitmapTracker?> CreateAsync(Qcow2Image image, CancellationToken cancellation)
    {
        List<Qcow2BitmapInfo> recording = (await Qcow2Bitmaps.LoadDirectoryAsync(image, cancellation).ConfigureAwait(false)).FindAll(b => b is { Auto: true, InUse: false });
        return recording.Count == 0 ? null : new Qcow2BitmapTracker(image, recording);
    }

    /// <summary>Records a range that is about to change.</summary>
    public async ValueTask RecordAsync(long offset, long length)
    {
        if (length <= 0)
            return;
        if (!Volatile.Read(ref _started))
            await StartAsync().ConfigureAwait(false);
        lock (_lock)
        {
            foreach ((Qcow2BitmapInfo info, byte[] bits) in _bitmaps)
                Set(bits, offset >> info.GranularityBits, (offset + length - 1) >> info.GranularityBits);
        }
    }

    /// <summary>Gives a bitmap's bits and begins it afresh: what is written from now on is in the new one.</summary>
    public async ValueTask<byte[]?> TakeAsync(string name)
    {
        if (!Volatile.Read(ref _started))
            await StartAsync().ConfigureAwait(false);
        lock (_lock)
        {
            int index = _bitmaps.FindIndex(b => b.Info.Name == name);
            if (index < 0)
                return null;
            byte[] bits = _bitmaps[index].Bits;
            _bitmaps[index] = (_bitmaps[index].Info, new byte[bits.Length]);
            return bits;
        }
    }

    /// <summary>How far a bitmap's bits are the same from an offset on, of at most <paramref name="length"/> bytes, and what they are.</summary>
    /// <returns>False: nothing was written yet, so that the file's bits are the right ones.</returns>
    public bool TryRun(string name, long offset, long length, out (long Length, bool Dirty) run)
    {
        run = default;
        if (!Volatile.Read(ref _started))
            return false;
        lock (_lock)
        {
            foreach ((Qcow2BitmapInfo info, byte[] bits) in _bitmaps)
            {
                if (info.Name != name)
                    continue;
                run = RunAt(bits, info.GranularityBits, offset, length);
                return true;
            }
        }
        return false;
    }

    /// <summary>How far bits are the same from an offset on. What lies behind the last of them was never written.</summary>
    public static (long Length, bool Dirty) RunAt(ReadOnlySpan<byte> bits, int granularityBits, long offset, long length)
    {
        long first = offset >> granularityBits;
        long last = (offset + length - 1) >> granularityBits;
        long count = bits.Length * 8L;
        if (first >= count)
            return (length, false);
        bool dirty = (bits[(int)(first >> 3)] & (1 << (int)(first & 7))) != 0;
        byte same = dirty ? (byte)0xff : (byte)0;
        long bit = first + 1;
        while (bit <= last && bit < count)
        {
            byte eight = bits[(int)(bit >> 3)];
            if ((bit & 7) == 0 && eight == same)
            {
                bit += 8;
                continue;
            }
            if (((eight & (1 << (int)(bit & 7))) != 0) != dirty)
                break;
            bit++;
        }
        return bit > last || (bit >= count && !dirty) ? (length, dirty) : (Math.Min(length, (bit << granularityBits) - offset), dirty);
    }

    /// <summary>Puts bits that were taken back in (a backup that failed).</summary>
    public void PutBack(string name, byte[] bits)
    {
        lock (_lock)
        {
            foreach ((Qcow2BitmapInfo info, byte[] own) in _bitmaps)
            {
                for (int i = 0; info.Name == name && i < Math.Min(own.Length, bits.Length); i++)
                    own[i] |= bits[i];
            }
        }
    }

    /// <summary>Writes the bitmaps back and takes the "in use" marks off. The image closes afterwards.</summary>
    public async ValueTask StoreAsync()
    {
        if (!_started)
            return;
        foreach ((Qcow2BitmapInfo info, byte[] bits) in _bitmaps)
            await Qcow2Bitmaps.FinishRecordingAsync(_image, info.Name, bits).ConfigureAwait(false);
    }

    private static void Set(byte[] bits, long first, long last)
    {
        for (long bit = first; bit <= last && bit >> 3 < bits.Length;)
        {
            if ((bit & 7) == 0 && bit + 7 <= last)
            {
                bits[bit >> 3] = 0xff;
                bit += 8;
                continue;
            }
            bits[bit >> 3] |= (byte)(1 << (int)(bit & 7));
            bit++;
        }
    }

    private async ValueTask StartAsync()
    {
        await _starting.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_started)
                return;
            List<(Qcow2BitmapInfo, byte[])> loaded = [];
            foreach (Qcow2BitmapInfo info in _recording)
                loaded.Add((info, await Qcow2Bitmaps.ReadBitsAsync(_image, info).ConfigureAwait(false)));
            await Qcow2Bitmaps.BeginRecordingAsync(_image, _recording).ConfigureAwait(false);
            lock (_lock)
                _bitmaps.AddRange(loaded);
            Volatile.Write(ref _started, true);
        }
        finally
        {
            _starting.Exit();
        }
    }
}
