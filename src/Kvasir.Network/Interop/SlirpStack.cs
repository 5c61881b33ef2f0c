using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Runtime.CompilerServices;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using System.Text;
using Kvasir.Linux;
using Kvasir.Network.User;

namespace Kvasir.Network.Interop;

/// <summary>What the stack tells its owner. On the owner's thread, out of one of the stack's methods.</summary>
internal interface ISlirpOwner
{
    /// <summary>A frame for the guest.</summary>
    void FrameForGuest(ReadOnlySpan<byte> frame);

    /// <summary>The guest sent something wrong.</summary>
    void GuestError(string message);
}

/// <summary>One instance of libslirp's TCP/IP stack. All calls come from one thread, as the library wants it.</summary>
internal sealed unsafe class SlirpStack : IDisposable
{
    private const int AddressFamilyInet = 2;
    private const int AddressFamilyInet6 = 10;

    private static readonly object CreationLock = new();

    // Wiring
    private readonly ISlirpOwner _owner;
    private readonly LibSlirp.Callbacks* _callbacks;
    private readonly List<Timer?> _timers = [];
    private GCHandle _self;
    private void* _slirp;
    private PollSet? _polls;

    /// <summary>What an owner threw inside of the library, whose frames no exception may cross.</summary>
    private ExceptionDispatchInfo? _failure;

    private sealed class Timer
    {
        public delegate* unmanaged[Cdecl]<void*, void> Callback;
        public void* Argument;
        public long ExpiresAt = long.MaxValue;
    }

    /// <exception cref="NetworkException">The library is missing or refuses the settings.</exception>
    public SlirpStack(UserNetworkSettings settings, ISlirpOwner owner)
    {
        LibSlirp.Load();
        _owner = owner;
        _self = GCHandle.Alloc(this);
        _callbacks = (LibSlirp.Callbacks*)NativeMemory.AllocZeroed((nuint)sizeof(LibSlirp.Callbacks));
        _callbacks->SendPacket = &OnSendPacket;
        _callbacks->GuestError = &OnGuestError;
        _callbacks->ClockNanoseconds = &OnClock;
        _callbacks->TimerNew = &OnTimerNew;
        _callbacks->TimerFree = &OnTimerFree;
        _callbacks->TimerModify = &OnTimerModify;
        _callbacks->RegisterPoll = &OnRegister;
        _callbacks->UnregisterPoll = &OnRegister;
        _callbacks->Notify = &OnNotify;
        // SAFETY: the library copies what it needs of the configuration and of the host name; the call-backs' table lives as long as the stack.
        byte* name = (byte*)Marshal.StringToCoTaskMemUTF8(settings.HostName);
        try
        {
            LibSlirp.Config config = new()
            {
                Version = 1,
                Restricted = settings.Restricted ? 1 : 0,
                Ip4Enabled = settings.Ip4 ? (byte)1 : (byte)0,
                Network = Number(settings.Network),
                Netmask = Number(settings.Netmask),
                Host = Number(settings.Host),
                Ip6Enabled = settings.Ip6 ? (byte)1 : (byte)0,
                Prefix6 = LibSlirp.Ip6Address.From(settings.Prefix6.GetAddressBytes()),
                PrefixLength6 = 64,
                Host6 = LibSlirp.Ip6Address.From(settings.Host6.GetAddressBytes()),
                HostName = settings.HostName is null ? null : name,
                DhcpStart = Number(settings.DhcpStart),
                NameServer = Number(settings.NameServer),
                NameServer6 = LibSlirp.Ip6Address.From(settings.NameServer6.GetAddressBytes()),
                Mtu = (nuint)settings.Mtu,
                Mru = (nuint)settings.Mtu,
            };
            // The library sets up globals with its first stack.
            lock (CreationLock)
                _slirp = LibSlirp.New(&config, _callbacks, (void*)GCHandle.ToIntPtr(_self));
        }
        finally
        {
            Marshal.FreeCoTaskMem((nint)name);
        }
        if (_slirp == null)
        {
            Free();
            throw new NetworkException("libslirp refuses the network's settings");
        }
    }

    /// <summary>Milliseconds on the stack's clock.</summary>
    private static long Now => Stopwatch.GetTimestamp() / (Stopwatch.Frequency / 1000);

    /// <summary>A frame of the guest.</summary>
    public void Input(ReadOnlySpan<byte> frame)
    {
        // SAFETY: the library copies the frame during the call.
        fixed (byte* start = frame)
            LibSlirp.Input(_slirp, start, frame.Length);
        ThrowFailure();
    }

    /// <summary>Adds the stack's sockets to what is waited for.</summary>
    /// <returns>How long the wait may be in milliseconds; -1 without limit.</returns>
    public int FillPolls(PollSet polls, int milliseconds)
    {
        uint timeout = milliseconds < 0 ? uint.MaxValue : (uint)milliseconds;
        _polls = polls;
        LibSlirp.FillPolls(_slirp, &timeout, &OnAddPoll, (void*)GCHandle.ToIntPtr(_self));
        return UntilTimer(timeout > int.MaxValue ? -1 : (int)timeout);
    }

    /// <summary>Shortens a wait to the next timer.</summary>
    public int UntilTimer(int milliseconds)
    {
        long wait = milliseconds < 0 ? long.MaxValue : milliseconds;
        long now = Now;
        foreach (Timer? timer in _timers)
        {
            if (timer is not null && timer.ExpiresAt != long.MaxValue)
                wait = Math.Min(wait, Math.Max(0, timer.ExpiresAt - now));
        }
        return wait > int.MaxValue ? -1 : (int)wait;
    }

    /// <summary>Serves the sockets after a wait that <see cref="FillPolls"/> prepared.</summary>
    public void ProcessPolls(PollSet polls, bool failed)
    {
        _polls = polls;
        LibSlirp.ProcessPolls(_slirp, failed ? 1 : 0, &OnReturned, (void*)GCHandle.ToIntPtr(_self));
        ThrowFailure();
    }

    public void RunTimers()
    {
        long now = Now;
        for (int index = 0; index < _timers.Count; index++)
        {
            Timer? timer = _timers[index];
            if (timer is null || timer.ExpiresAt > now)
                continue;
            timer.ExpiresAt = long.MaxValue;
            timer.Callback(timer.Argument);
        }
        ThrowFailure();
    }

    /// <summary>Opens a port of the host.</summary>
    /// <returns>0, or errno.</returns>
    public int AddForward(PortForward forward)
    {
        byte* host = stackalloc byte[28];
        byte* guest = stackalloc byte[28];
        uint hostLength = Write(host, forward.HostAddress, forward.HostPort);
        uint guestLength = Write(guest, forward.GuestAddress, forward.GuestPort);
        // SAFETY: both are struct sockaddr_in or sockaddr_in6 of the length given.
        if (LibSlirp.AddForward(_slirp, host, hostLength, guest, guestLength, Flags(forward)) >= 0)
            return 0;
        int errno = Marshal.GetLastSystemError();
        return errno == 0 ? 22 : errno;
    }

    /// <returns>False where there is none such.</returns>
    public bool RemoveForward(PortForward forward)
    {
        byte* host = stackalloc byte[28];
        uint hostLength = Write(host, forward.HostAddress, forward.HostPort);
        // SAFETY: as in AddForward.
        return LibSlirp.RemoveForward(_slirp, host, hostLength, Flags(forward)) >= 0;
    }

    /// <summary>The library's own table of connections.</summary>
    public string ConnectionInfo()
    {
        byte* text = LibSlirp.ConnectionInfo(_slirp);
        string result = Marshal.PtrToStringUTF8((nint)text) ?? "";
        // SAFETY: a GLib string, and GLib allocates with malloc(3) since 2.46.
        NativeMemory.Free(text);
        return result;
    }

    public void Dispose()
    {
        if (_slirp != null)
            LibSlirp.Cleanup(_slirp);
        _slirp = null;
        Free();
    }

    private void Free()
    {
        if (!_self.IsAllocated)
            return;
        _self.Free();
        NativeMemory.Free(_callbacks);
    }

    private void ThrowFailure()
    {
        ExceptionDispatchInfo? failure = _failure;
        _failure = null;
        failure?.Throw();
    }

    /// <summary>struct in_addr: the address's bytes as they are.</summary>
    private static uint Number(IPAddress address) => MemoryMarshal.Read<uint>(address.GetAddressBytes());

    private static int Flags(PortForward forward) =>
        (forward.Udp ? LibSlirp.ForwardUdp : 0) | (forward.HostAddress.AddressFamily == AddressFamily.InterNetworkV6 ? LibSlirp.ForwardIp6Only : 0);

    /// <summary>Writes a struct sockaddr_in or sockaddr_in6 into 28 bytes.</summary>
    private static uint Write(byte* target, IPAddress address, int port)
    {
        Span<byte> bytes = new(target, 28);
        bytes.Clear();
        bool wide = address.AddressFamily == AddressFamily.InterNetworkV6;
        MemoryMarshal.Write(bytes, (ushort)(wide ? AddressFamilyInet6 : AddressFamilyInet));
        BinaryPrimitives.WriteUInt16BigEndian(bytes[2..], (ushort)port);
        address.GetAddressBytes().CopyTo(bytes[(wide ? 8 : 4)..]);
        return wide ? 28u : 16u;
    }

    // SAFETY: the library hands every call-back the handle that it was made with, while the stack lives.
    private static SlirpStack From(void* opaque) => Unsafe.As<SlirpStack>(GCHandle.FromIntPtr((nint)opaque).Target!);

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static nint OnSendPacket(byte* frame, nuint length, void* opaque)
    {
        SlirpStack stack = From(opaque);
        try
        {
            // SAFETY: the frame is the library's for the time of the call.
            stack._owner.FrameForGuest(new ReadOnlySpan<byte>(frame, (int)length));
        }
        catch (Exception e)
        {
            stack._failure ??= ExceptionDispatchInfo.Capture(e);
        }
        return (nint)length;
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void OnGuestError(byte* message, void* opaque)
    {
        SlirpStack stack = From(opaque);
        try
        {
            stack._owner.GuestError(Marshal.PtrToStringUTF8((nint)message) ?? "");
        }
        catch (Exception e)
        {
            stack._failure ??= ExceptionDispatchInfo.Capture(e);
        }
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static long OnClock(void* opaque) => Now * 1_000_000;

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void* OnTimerNew(delegate* unmanaged[Cdecl]<void*, void> callback, void* argument, void* opaque)
    {
        List<Timer?> timers = From(opaque)._timers;
        timers.Add(new Timer { Callback = callback, Argument = argument });
        return (void*)timers.Count;
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void OnTimerFree(void* timer, void* opaque) => From(opaque)._timers[(int)(nint)timer - 1] = null;

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void OnTimerModify(void* timer, long milliseconds, void* opaque)
    {
        Timer? modified = From(opaque)._timers[(int)(nint)timer - 1];
        if (modified is not null)
            modified.ExpiresAt = milliseconds;
    }

    /// <summary>Descriptors are listed anew for each wait.</summary>
    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void OnRegister(int fd, void* opaque)
    {
    }

    /// <summary>All calls come from the loop's own thread, which looks again before it sleeps.</summary>
    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void OnNotify(void* opaque)
    {
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static int OnAddPoll(int fd, int events, void* opaque)
    {
        PollEvents wanted = PollEvents.None;
        LibSlirp.Poll asked = (LibSlirp.Poll)events;
        if (asked.HasFlag(LibSlirp.Poll.In))
            wanted |= PollEvents.Input;
        if (asked.HasFlag(LibSlirp.Poll.Out))
            wanted |= PollEvents.Output;
        if (asked.HasFlag(LibSlirp.Poll.Priority))
            wanted |= PollEvents.Priority;
        return From(opaque)._polls!.Add(fd, wanted);
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static int OnReturned(int index, void* opaque)
    {
        PollSet polls = From(opaque)._polls!;
        PollEvents returned = index >= 0 && index < polls.Count ? polls.Returned(index) : PollEvents.None;
        LibSlirp.Poll result = LibSlirp.Poll.None;
        if (returned.HasFlag(PollEvents.Input))
            result |= LibSlirp.Poll.In;
        if (returned.HasFlag(PollEvents.Output))
            result |= LibSlirp.Poll.Out;
        if (returned.HasFlag(PollEvents.Priority))
            result |= LibSlirp.Poll.Priority;
        if (returned.HasFlag(PollEvents.Error))
            result |= LibSlirp.Poll.Error;
        if (returned.HasFlag(PollEvents.HangUp))
            result |= LibSlirp.Poll.HangUp;
        return (int)result;
    }
}
