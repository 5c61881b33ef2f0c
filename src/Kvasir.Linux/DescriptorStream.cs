using System;
using System.IO;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// Writes to a descriptor as it is. The console's own streams set up the terminal and handlers of signals with a thread of their own first, which takes longer than most
/// commands; a file stream would keep a position, which whoever shares the descriptor does not know of.
/// </summary>
public sealed class DescriptorStream(int descriptor) : Stream
{
    public override bool CanRead => false;

    public override bool CanSeek => false;

    public override bool CanWrite => true;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    /// <exception cref="IOException">Nobody takes the bytes any more.</exception>
    public override void Write(ReadOnlySpan<byte> buffer)
    {
        int error = FileDescriptor.Write(descriptor, buffer);
        if (error != 0)
            throw new IOException(Marshal.GetPInvokeErrorMessage(error));
    }

    public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

    public override void Flush()
    {
    }

    public override int Read(byte[] buffer, int offset, int count) => throw new NotSupportedException();

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();
}
