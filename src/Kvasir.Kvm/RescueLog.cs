using System;
using System.Buffers.Binary;
using System.Diagnostics;
using System.Threading;

namespace Kvasir.Kvm;

/// <summary>Counts the instructions of a VM that KVM could not execute, and says so at a limited rate. Any vCPU's thread.</summary>
public sealed class RescueLog(Action<string>? log)
{
    private const long Nothing = -1;

    /// <summary>Above this share of the time, in percent, the host is named plainly.</summary>
    private const double HighShare = 5;

    private readonly long _begun = Stopwatch.GetTimestamp();
    private readonly long _second = Stopwatch.Frequency;
    private long _count;
    private long _spent;
    private long _lastLine = Nothing;
    private int _warned;

    /// <summary>Instructions executed outside KVM so far.</summary>
    public long Count => Interlocked.Read(ref _count);

    /// <summary>Time spent on them.</summary>
    public TimeSpan Spent => Stopwatch.GetElapsedTime(0, Interlocked.Read(ref _spent));

    /// <summary>One line for the end of a VM's life.</summary>
    public string Summary => $"{Count} instructions that KVM could not execute were executed by the software CPU, in {Spent.TotalSeconds:f1} s";

    /// <summary>Notes one instruction.</summary>
    /// <param name="vcpu">The vCPU's number.</param>
    /// <param name="address">Its linear address.</param>
    /// <param name="first">What KVM said of its bytes: their number, then the first seven.</param>
    /// <param name="second">The next eight.</param>
    /// <param name="begun">Timestamp of when KVM gave up.</param>
    internal void Add(int vcpu, ulong address, ulong first, ulong second, long begun)
    {
        long now = Stopwatch.GetTimestamp();
        long count = Interlocked.Increment(ref _count);
        long spent = Interlocked.Add(ref _spent, now - begun);
        if (log is null)
            return;
        long last = Interlocked.Read(ref _lastLine);
        if (last != Nothing && now - last < _second)
            return;
        if (Interlocked.CompareExchange(ref _lastLine, now, last) != last)
            return;
        log($"vCPU {vcpu}: KVM gave up at {address:x16} ({Bytes(first, second)}); the software CPU executed it ({count} so far)");
        double share = 100.0 * spent / (now - _begun);
        if (now - _begun > _second && share > HighShare && Interlocked.Exchange(ref _warned, 1) == 0)
            log($"{share:f0} % of the time goes to instructions that this host's KVM cannot execute: it emulates kernels instead of running them; --accel soft may be faster here");
    }

    private static string Bytes(ulong first, ulong second)
    {
        Span<byte> bytes = stackalloc byte[16];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, first);
        BinaryPrimitives.WriteUInt64LittleEndian(bytes[8..], second);
        int length = Math.Min((int)bytes[0], 15);
        return length == 0 ? "bytes unknown" : Convert.ToHexStringLower(bytes.Slice(1, length));
    }
}
