using System;
using System.Runtime.InteropServices;
using Kvasir.Linux;

namespace Kvasir.Network.Interop;

/// <summary>libslirp's C interface (libslirp.h, 4.7), found at run time.</summary>
internal static unsafe class LibSlirp
{
    private const string File = "libslirp.so.0";
    private const string Package = "the user-mode network needs libslirp: install the package libslirp0 (Debian, Ubuntu) or libslirp (Fedora, Arch)";

    private static readonly object LoadLock = new();
    private static bool s_loaded;

    /// <summary>struct SlirpConfig, version 1: what this program uses is all in it. The later fields are laid out and left zero.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Config
    {
        public uint Version;
        public int Restricted;
        public byte Ip4Enabled;
        public uint Network;
        public uint Netmask;
        public uint Host;
        public byte Ip6Enabled;
        public Ip6Address Prefix6;
        public byte PrefixLength6;
        public Ip6Address Host6;
        public byte* HostName;
        public byte* TftpServerName;
        public byte* TftpPath;
        public byte* BootFile;
        public uint DhcpStart;
        public uint NameServer;
        public Ip6Address NameServer6;
        public byte** DnsSearch;
        public byte* DomainName;
        public nuint Mtu;
        public nuint Mru;
        public byte DisableHostLoopback;
        public byte EnableEmulation;
        public void* OutboundAddress;
        public void* OutboundAddress6;
        public byte DisableDns;
        public byte DisableDhcp;
    }

    /// <summary>struct in6_addr: sixteen bytes, aligned to four.</summary>
    [StructLayout(LayoutKind.Sequential, Pack = 4)]
    internal struct Ip6Address
    {
        public uint First;
        public uint Second;
        public uint Third;
        public uint Fourth;

        public static Ip6Address From(ReadOnlySpan<byte> bytes) => MemoryMarshal.Read<Ip6Address>(bytes);
    }

    /// <summary>struct SlirpCb.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct Callbacks
    {
        public delegate* unmanaged[Cdecl]<byte*, nuint, void*, nint> SendPacket;
        public delegate* unmanaged[Cdecl]<byte*, void*, void> GuestError;
        public delegate* unmanaged[Cdecl]<void*, long> ClockNanoseconds;
        public delegate* unmanaged[Cdecl]<delegate* unmanaged[Cdecl]<void*, void>, void*, void*, void*> TimerNew;
        public delegate* unmanaged[Cdecl]<void*, void*, void> TimerFree;
        public delegate* unmanaged[Cdecl]<void*, long, void*, void> TimerModify;
        public delegate* unmanaged[Cdecl]<int, void*, void> RegisterPoll;
        public delegate* unmanaged[Cdecl]<int, void*, void> UnregisterPoll;
        public delegate* unmanaged[Cdecl]<void*, void> Notify;
        public void* InitCompleted;
        public void* TimerNewOpaque;
    }

    /// <summary>SLIRP_POLL_*.</summary>
    [Flags]
    internal enum Poll
    {
        None = 0,
        In = 1,
        Out = 2,
        Priority = 4,
        Error = 8,
        HangUp = 16,
    }

    /// <summary>Bytes; less than the library's largest buffers have.</summary>
    private const int SmallestMappedBlock = 64 << 10;

    public const int ForwardUdp = 1;
    public const int ForwardIp6Only = 2;

    public static delegate* unmanaged[Cdecl]<Config*, Callbacks*, void*, void*> New { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, void> Cleanup { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, uint*, delegate* unmanaged[Cdecl]<int, int, void*, int>, void*, void> FillPolls { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, int, delegate* unmanaged[Cdecl]<int, void*, int>, void*, void> ProcessPolls { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, byte*, int, void> Input { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, byte*, uint, byte*, uint, int, int> AddForward { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, byte*, uint, int, int> RemoveForward { get; private set; }

    public static delegate* unmanaged[Cdecl]<void*, byte*> ConnectionInfo { get; private set; }

    public static delegate* unmanaged[Cdecl]<byte*> VersionString { get; private set; }

    /// <summary>Finds the library where that was not done yet.</summary>
    /// <exception cref="NetworkException">It is not there, or too old.</exception>
    public static void Load()
    {
        lock (LoadLock)
        {
            if (s_loaded)
                return;
            if (!NativeLibrary.TryLoad(File, out nint library))
                throw new NetworkException($"{Package}; or choose --net none");
            // SAFETY: the signatures are those of libslirp.h.
            VersionString = (delegate* unmanaged[Cdecl]<byte*>)Find(library, "slirp_version_string");
            New = (delegate* unmanaged[Cdecl]<Config*, Callbacks*, void*, void*>)Find(library, "slirp_new");
            Cleanup = (delegate* unmanaged[Cdecl]<void*, void>)Find(library, "slirp_cleanup");
            FillPolls = (delegate* unmanaged[Cdecl]<void*, uint*, delegate* unmanaged[Cdecl]<int, int, void*, int>, void*, void>)Find(library, "slirp_pollfds_fill");
            ProcessPolls = (delegate* unmanaged[Cdecl]<void*, int, delegate* unmanaged[Cdecl]<int, void*, int>, void*, void>)Find(library, "slirp_pollfds_poll");
            Input = (delegate* unmanaged[Cdecl]<void*, byte*, int, void>)Find(library, "slirp_input");
            AddForward = (delegate* unmanaged[Cdecl]<void*, byte*, uint, byte*, uint, int, int>)Find(library, "slirp_add_hostxfwd");
            RemoveForward = (delegate* unmanaged[Cdecl]<void*, byte*, uint, int, int>)Find(library, "slirp_remove_hostxfwd");
            ConnectionInfo = (delegate* unmanaged[Cdecl]<void*, byte*>)Find(library, "slirp_connection_info");
            // A connection has two buffers of 128 KiB. In the heap they cost 70 MiB more for 300 connections, which came and went with their number.
            _ = NativeHeap.MapBlocksFrom(SmallestMappedBlock);
            s_loaded = true;
        }
    }

    /// <summary>Whether the library is there, and its version, for reports.</summary>
    public static string? FindVersion()
    {
        try
        {
            Load();
        }
        catch (NetworkException)
        {
            return null;
        }
        return Marshal.PtrToStringUTF8((nint)VersionString());
    }

    private static nint Find(nint library, string name) => NativeLibrary.TryGetExport(library, name, out nint address)
        ? address
        : throw new NetworkException($"the libslirp of this host is too old (it has no {name}): version 4.5 or later is needed; or choose --net none");
}
