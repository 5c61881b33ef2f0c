using System;
using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Filters;

/// <summary>Rates that one node or several together keep to.</summary>
public sealed class ThrottleGroup
{
    private readonly Bucket[] _read;
    private readonly Bucket[] _write;

    public ThrottleGroup(ThrottleLimits limits)
    {
        double burst = limits.BurstSeconds;
        _read =
        [
            new(limits.BytesPerSecond, burst, bytes: true), new(limits.ReadBytesPerSecond, burst, bytes: true),
            new(limits.RequestsPerSecond, burst, bytes: false), new(limits.ReadRequestsPerSecond, burst, bytes: false),
        ];
        // The totals are shared between both directions.
        _write =
        [
            _read[0], new(limits.WriteBytesPerSecond, burst, bytes: true),
            _read[2], new(limits.WriteRequestsPerSecond, burst, bytes: false),
        ];
    }

    /// <summary>Waits until a request may start.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask WaitAsync(bool isWrite, long bytes, CancellationToken cancellation)
    {
        TimeSpan wait = TimeSpan.Zero;
        foreach (Bucket bucket in isWrite ? _write : _read)
        {
            TimeSpan own = bucket.Take(bytes);
            wait = own > wait ? own : wait;
        }
        if (wait > TimeSpan.Zero)
            await Task.Delay(wait, cancellation).ConfigureAwait(false);
    }

    /// <summary>A leaky bucket: what was taken drains at the rate; above the burst level, takers wait until it is down again.</summary>
    private sealed class Bucket(double rate, double burstSeconds, bool bytes)
    {
        private readonly Lock _lock = new();
        private double _level;
        private long _last = Stopwatch.GetTimestamp();

        public TimeSpan Take(long length)
        {
            if (rate <= 0)
                return TimeSpan.Zero;
            lock (_lock)
            {
                long now = Stopwatch.GetTimestamp();
                _level = Math.Max(0, _level - (Stopwatch.GetElapsedTime(_last, now).TotalSeconds * rate));
                _last = now;
                double before = _level;
                _level += bytes ? length : 1;
                double excess = before - (rate * burstSeconds);
                return excess <= 0 ? TimeSpan.Zero : TimeSpan.FromSeconds(excess / rate);
            }
        }
    }
}
