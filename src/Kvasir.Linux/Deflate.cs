using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// Raw deflate (RFC 1951) of one block of memory with a chosen window, through the zlib that the .NET runtime brings along.
/// System.IO.Compression itself always uses a 32 KiB window, which readers of qcow2 with their 4 KiB window refuse. One instance
/// serves one thread at a time and is reused: its state is allocated once.
/// </summary>
public sealed unsafe partial class Deflate : IDisposable
{
    private const int MethodDeflated = 8;
    private const int Finish = 4;
    private const int StreamEnd = 1;
    private const int Ok = 0;
    private const string Library = "libSystem.IO.Compression.Native";

    private readonly ZStream* _stream;
    private readonly bool _compress;
    private readonly int _windowBits;
    private readonly int _level;

    /// <param name="compress">True to compress, false to expand.</param>
    /// <param name="windowBits">Logarithm of the window: 9 to 15.</param>
    /// <param name="level">0 to 9, -1 for the library's default.</param>
    public Deflate(bool compress, int windowBits, int level = -1)
    {
        _compress = compress;
        _windowBits = windowBits;
        _level = level;
        _stream = (ZStream*)NativeMemory.AllocZeroed((nuint)sizeof(ZStream));
        int result = Begin();
        if (result != Ok)
        {
            NativeMemory.Free(_stream);
            throw new LinuxException($"start zlib (code {result})");
        }
    }

    ~Deflate() => Free();

    /// <summary>Runs one block through. Returns the bytes produced, or -1 when they do not fit or the input is damaged.</summary>
    public int Run(ReadOnlySpan<byte> source, Span<byte> target)
    {
        int result;
        if (_compress)
        {
            // The runtime's shim has no reset for compression, so each block starts a stream of its own.
            _ = CompressionNative_DeflateEnd(_stream);
            result = Begin();
        }
        else
        {
            result = CompressionNative_InflateReset2_(_stream, -_windowBits);
        }
        if (result != Ok)
            return -1;
        // SAFETY: both spans stay pinned during the call, and zlib keeps neither pointer past it (reset drops them).
        fixed (byte* input = source)
        fixed (byte* output = target)
        {
            _stream->NextIn = input;
            _stream->AvailableIn = (uint)source.Length;
            _stream->NextOut = output;
            _stream->AvailableOut = (uint)target.Length;
            result = _compress ? CompressionNative_Deflate(_stream, Finish) : CompressionNative_Inflate(_stream, Finish);
            int produced = target.Length - (int)_stream->AvailableOut;
            // An expansion is good once the target is full, whether or not the input has more (sector padding follows it).
            return result == StreamEnd || (!_compress && _stream->AvailableOut == 0) ? produced : -1;
        }
    }

    public void Dispose()
    {
        Free();
        GC.SuppressFinalize(this);
    }

    // SAFETY: the stream is zeroed native memory that never moves, as zlib keeps a pointer to it.
    private int Begin() => _compress
        ? CompressionNative_DeflateInit2_(_stream, _level, MethodDeflated, -_windowBits, 9, 0)
        : CompressionNative_InflateInit2_(_stream, -_windowBits);

    private void Free()
    {
        _ = _compress ? CompressionNative_DeflateEnd(_stream) : CompressionNative_InflateEnd(_stream);
        NativeMemory.Free(_stream);
    }

    /// <summary>The runtime's portable z_stream.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct ZStream
    {
        public byte* NextIn;
        public byte* NextOut;
        private readonly byte* _message;
        private readonly void* _state;
        public uint AvailableIn;
        public uint AvailableOut;
    }

    [LibraryImport(Library)]
    private static partial int CompressionNative_DeflateInit2_(ZStream* stream, int level, int method, int windowBits, int memLevel, int strategy);

    [LibraryImport(Library)]
    private static partial int CompressionNative_Deflate(ZStream* stream, int flush);

    [LibraryImport(Library)]
    private static partial int CompressionNative_DeflateEnd(ZStream* stream);

    [LibraryImport(Library)]
    private static partial int CompressionNative_InflateInit2_(ZStream* stream, int windowBits);

    [LibraryImport(Library)]
    private static partial int CompressionNative_Inflate(ZStream* stream, int flush);

    [LibraryImport(Library)]
    private static partial int CompressionNative_InflateReset2_(ZStream* stream, int windowBits);

    [LibraryImport(Library)]
    private static partial int CompressionNative_InflateEnd(ZStream* stream);
}
