using System;
using System.Runtime.InteropServices;

namespace Kvasir.Network.Frames;

/// <summary>The header as the bytes that a tap or a ring carries.</summary>
public static class VnetHeaderBytes
{
    public static ReadOnlySpan<byte> AsBytes(this in VnetHeader header) => MemoryMarshal.AsBytes(new ReadOnlySpan<VnetHeader>(in header));

    public static Span<byte> AsWritableBytes(this ref VnetHeader header) => MemoryMarshal.AsBytes(new Span<VnetHeader>(ref header));
}
