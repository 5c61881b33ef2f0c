using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>What a tap's reader can take, so that the kernel need not do it (TUNSETOFFLOAD, linux/if_tun.h).</summary>
[Flags]
public enum TapOffloads
{
    None = 0,
    Checksum = 1 << 0,
    Tso4 = 1 << 1,
    Tso6 = 1 << 2,
    TsoEcn = 1 << 3,
}

/// <summary>
/// One queue of a tap device (Documentation/networking/tuntap.rst): each read and write is a frame with a virtio-net header before it. A device that
/// was made by opening it goes away with its last descriptor.
/// </summary>
public sealed unsafe partial class TapDevice : IDisposable
{
    /// <summary>Bytes of header before each frame: struct virtio_net_hdr_v1.</summary>
    public const int HeaderSize = 12;

    private const int NameSize = 16;
    private const int ReadWrite = 2;
    private const int NonBlocking = 0x800;
    private const int CloseOnExec = 0x80000;
    private const short FlagTap = 0x0002;
    private const short FlagNoPacketInfo = 0x1000;
    private const short FlagVnetHeader = 0x4000;
    private const short FlagMultiQueue = 0x0100;
    private const nuint SetInterface = 0x400454ca;
    private const nuint SetOffload = 0x400454d0;
    private const nuint SetVnetHeaderSize = 0x400454d8;
    private const nuint GetFlags = 0x8913;
    private const nuint SetFlags = 0x8914;
    private const nuint SetAddress = 0x8916;
    private const nuint SetNetmask = 0x891c;
    private const nuint SetMtuRequest = 0x8922;
    private const nuint GetIndex = 0x8933;
    private const nuint AddToBridge = 0x89a2;
    private const short InterfaceUp = 1;
    private const int FamilyInet = 2;
    private const int SocketDatagram = 2;

    private readonly SafeFileHandle _handle;

    private TapDevice(SafeFileHandle handle, string name)
    {
        _handle = handle;
        Name = name;
    }

    /// <summary>The interface's name as the kernel gave it.</summary>
    public string Name { get; }

    public int Fd => (int)_handle.DangerousGetHandle();

    /// <summary>struct ifreq: a name, then a union of 24 bytes.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Request
    {
        public NameBytes Name;
        public UnionBytes Value;
    }

    [InlineArray(NameSize)]
    private struct NameBytes
    {
        private byte _first;
    }

    [InlineArray(24)]
    private struct UnionBytes
    {
        private byte _first;
    }

    /// <summary>Opens a queue of a tap, making the device where it is missing.</summary>
    /// <param name="name">The interface's name; "" or one with %d lets the kernel choose.</param>
    /// <param name="multiQueue">The device has (or shall have) several queues.</param>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public static TapDevice Open(string name, bool multiQueue)
    {
        int fd = open("/dev/net/tun", ReadWrite | NonBlocking | CloseOnExec);
        if (fd < 0)
            throw new LinuxException("open /dev/net/tun", Marshal.GetLastPInvokeError());
        SafeFileHandle handle = new(fd, ownsHandle: true);
        try
        {
            Request request = Named(name);
            Store(ref request, (short)(FlagTap | FlagNoPacketInfo | FlagVnetHeader | (multiQueue ? FlagMultiQueue : 0)));
            Call(fd, SetInterface, ref request, $"open the tap device '{name}'");
            int size = HeaderSize;
            // SAFETY: the ioctl reads one int.
            if (ioctl(fd, SetVnetHeaderSize, &size) != 0)
                throw new LinuxException("set the tap device's header size", Marshal.GetLastPInvokeError());
            ReadOnlySpan<byte> given = request.Name;
            int end = given.IndexOf((byte)0);
            return new TapDevice(handle, Encoding.ASCII.GetString(end < 0 ? given : given[..end]));
        }
        catch (LinuxException)
        {
            handle.Dispose();
            throw;
        }
    }

    /// <summary>Says what may be left to the reader.</summary>
    /// <returns>False where the kernel cannot.</returns>
    public bool TrySetOffloads(TapOffloads offloads) => ioctl(Fd, SetOffload, (void*)(nuint)(int)offloads) == 0;

    /// <summary>Puts the interface up.</summary>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public void BringUp() => WithSocket(socket =>
    {
        Request request = Named(Name);
        Call(socket, GetFlags, ref request, $"read the state of {Name}");
        Store(ref request, (short)(MemoryMarshal.Read<short>(request.Value) | InterfaceUp));
        Call(socket, SetFlags, ref request, $"bring {Name} up");
    });

    /// <summary>Whether the interface is up; false too where it cannot be asked.</summary>
    public bool IsUp()
    {
        bool up = false;
        WithSocket(socket =>
        {
            Request request = Named(Name);
            Call(socket, GetFlags, ref request, $"read the state of {Name}");
            up = (MemoryMarshal.Read<short>(request.Value) & InterfaceUp) != 0;
        });
        return up;
    }

    /// <exception cref="LinuxException">The kernel refused.</exception>
    public void SetMtu(int bytes) => WithSocket(socket =>
    {
        Request request = Named(Name);
        MemoryMarshal.Write(request.Value, bytes);
        Call(socket, SetMtuRequest, ref request, $"set the MTU of {Name} to {bytes}");
    });

    /// <summary>Makes the interface a port of a bridge.</summary>
    /// <exception cref="LinuxException">There is no such bridge, or the kernel refused.</exception>
    public void JoinBridge(string bridge) => WithSocket(socket =>
    {
        Request request = Named(Name);
        Call(socket, GetIndex, ref request, $"find the interface {Name}");
        int index = MemoryMarshal.Read<int>(request.Value);
        Request join = Named(bridge);
        MemoryMarshal.Write(join.Value, index);
        Call(socket, AddToBridge, ref join, $"add {Name} to the bridge {bridge}");
    });

    /// <summary>Gives the host's end an IPv4 address.</summary>
    /// <param name="address">In network byte order, as its four bytes read.</param>
    /// <param name="prefixLength">1 to 32.</param>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public void SetHostAddress(ReadOnlySpan<byte> address, int prefixLength)
    {
        byte[] bytes = address.ToArray();
        uint mask = prefixLength == 0 ? 0 : uint.MaxValue << (32 - prefixLength);
        byte[] maskBytes = [(byte)(mask >> 24), (byte)(mask >> 16), (byte)(mask >> 8), (byte)mask];
        WithSocket(socket =>
        {
            foreach ((nuint call, byte[] value) in ((nuint, byte[])[])[(SetAddress, bytes), (SetNetmask, maskBytes)])
            {
                // struct sockaddr_in: family, port, address.
                Request request = Named(Name);
                Store(ref request, FamilyInet);
                value.CopyTo(((Span<byte>)request.Value)[4..]);
                Call(socket, call, ref request, $"give {Name} an address");
            }
        });
    }

    public void Dispose() => _handle.Dispose();

    private static Request Named(string name)
    {
        Request request = default;
        if (Encoding.ASCII.GetByteCount(name) >= NameSize)
            throw new LinuxException($"use '{name}' as an interface's name: it is longer than {NameSize - 1} characters", 36);
        Encoding.ASCII.GetBytes(name, request.Name);
        return request;
    }

    private static void Store(ref Request request, short value) => MemoryMarshal.Write(request.Value, value);

    private static void Call(int fd, nuint code, ref Request request, string what)
    {
        fixed (Request* pointer = &request)
        {
            // SAFETY: struct ifreq is as large as the kernel's, and pinned.
            if (ioctl(fd, code, pointer) != 0)
                throw new LinuxException(what, Marshal.GetLastPInvokeError());
        }
    }

    private static void WithSocket(Action<int> action)
    {
        int fd = socket(FamilyInet, SocketDatagram | CloseOnExec, 0);
        if (fd < 0)
            throw new LinuxException("make a socket", Marshal.GetLastPInvokeError());
        using SafeFileHandle handle = new(fd, ownsHandle: true);
        action(fd);
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int socket(int family, int type, int protocol);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ioctl(int fd, nuint request, void* argument);
}
