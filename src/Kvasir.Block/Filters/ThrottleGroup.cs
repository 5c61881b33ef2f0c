using System;
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
    private readonly TimeProvider _clock;

    /// <param name="limits">The rates.</param>
    /// <param name="clock">What they are measured by; the system's where null.</param>
    public ThrottleGroup(ThrottleLimits limits, TimeProvider? clock = null)
    {
        _clock = clock ?? TimeProvider.System;
        double burst = limits.BurstSeconds;
        _read =
        [
            new(limits.BytesPerSecond, burst, bytes: true, _clock), new(limits.ReadBytesPerSecond, burst, bytes: true, _clock),
            new(limits.RequestsPerSecond, burst, bytes: false, _clock), new(limits.ReadRequestsPerSecond, burst, bytes: false, _clock),
        ];
        // The totals are shared between both directions.
        _write =
        [
            _read[0], new(limits.WriteBytesPerSecond, burst, bytes: true, _clock),
            _read[2], new(limits.WriteRequestsPerSecond, burst, bytes: false, _clock),
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
            await Task.Delay(wait, _clock, cancellation).ConfigureAwait(false);
    }

    /// <summary>A leaky bucket: what was taken drains at the rate; above the burst level, takers wait until it is down again.</summary>
    private sealed class Bucket(double rate, double burstSeconds, bool bytes, TimeProvider clock)
    {
        private readonly Lock _lock = new();
        private double _level;
        private long _last = clock.GetTimestamp();

        public TimeSpan Take(long length)
        {
            if (rate <= 0)
                return TimeSpan.Zero;
            lock (_lock)
            {
                long now = clock.GetTimestamp();
                _level = Math.Max(0, _level - (clock.GetElapsedTime(_last, now).TotalSeconds * rate));
                _last = now;
                double before = _level;
                _level += bytes ? length : 1;
                double excess = before - (rate * burstSeconds);
                return excess <= 0 ? TimeSpan.Zero : TimeSpan.FromSeconds(excess / rate);
            }
        }
    }
}
