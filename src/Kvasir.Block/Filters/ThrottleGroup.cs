using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Filters;

/// <summary>Rates that one node or several together keep to.</summary>
public sealed class ThrottleGroup
{
    // A timer's longest time; waits beyond that take several.
    private static readonly TimeSpan LongestTimer = TimeSpan.FromDays(40);

    private readonly Bucket[] _read;
    private readonly Bucket[] _write;
    private readonly double _requestSize;
    private readonly TimeProvider _clock;

    /// <param name="limits">The rates.</param>
    /// <param name="clock">What they are measured by; the system's where null.</param>
    public ThrottleGroup(ThrottleLimits limits, TimeProvider? clock = null)
    {
        _clock = clock ?? TimeProvider.System;
        _requestSize = limits.RequestSize;
        Bucket New(ThrottleRate rate, bool bytes) => new(rate, limits.BurstSeconds, bytes, _clock);
        _read =
        [
            New(limits.BytesPerSecond, bytes: true), New(limits.ReadBytesPerSecond, bytes: true),
            New(limits.RequestsPerSecond, bytes: false), New(limits.ReadRequestsPerSecond, bytes: false),
        ];
        // The totals are shared between both directions.
        _write = [_read[0], New(limits.WriteBytesPerSecond, bytes: true), _read[2], New(limits.WriteRequestsPerSecond, bytes: false)];
    }

    /// <summary>Waits until a request may start.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask WaitAsync(bool isWrite, long bytes, CancellationToken cancellation)
    {
        double requests = _requestSize > 0 ? Math.Max(1, bytes / _requestSize) : 1;
        double seconds = 0;
        foreach (Bucket bucket in isWrite ? _write : _read)
            seconds = Math.Max(seconds, bucket.Take(bytes, requests));
        for (double left = seconds; left > 0; left -= LongestTimer.TotalSeconds)
            await Task.Delay(left < LongestTimer.TotalSeconds ? TimeSpan.FromSeconds(left) : LongestTimer, _clock, cancellation).ConfigureAwait(false);
    }

    /// <summary>
    /// A leaky bucket: what was taken drains at the average; when it is full, takers wait until it is down again. A burst that may last longer than a second
    /// has a second bucket, which keeps it to its own rate.
    /// </summary>
    private sealed class Bucket
    {
        private readonly Lock _lock = new();
        private readonly double _rate;
        private readonly double _size;
        private readonly double _burstRate;
        private readonly double _burstSize;
        private readonly bool _bytes;
        private readonly TimeProvider _clock;

        // State
        private double _level;
        private double _burstLevel;
        private long _last;

        public Bucket(ThrottleRate rate, double restSeconds, bool bytes, TimeProvider clock)
        {
            _rate = rate.Average;
            _size = rate.Most > 0 ? rate.Most * rate.MostSeconds : rate.Average * restSeconds;
            _burstRate = rate.Most > 0 && rate.MostSeconds > 1 ? rate.Most : 0;
            _burstSize = rate.Most / 10;
            _bytes = bytes;
            _clock = clock;
            _last = clock.GetTimestamp();
        }

        /// <summary>Takes at once, and says in how many seconds what was taken may be used.</summary>
        public double Take(long bytes, double requests)
        {
            if (_rate <= 0)
                return 0;
            lock (_lock)
            {
                long now = _clock.GetTimestamp();
                double passed = _clock.GetElapsedTime(_last, now).TotalSeconds;
                _last = now;
                _level = Math.Max(0, _level - (passed * _rate));
                _burstLevel = Math.Max(0, _burstLevel - (passed * _burstRate));
                double wait = (_level - _size) / _rate;
                if (_burstRate > 0)
                    wait = Math.Max(wait, (_burstLevel - _burstSize) / _burstRate);
                double taken = _bytes ? bytes : requests;
                _level += taken;
                _burstLevel += taken;
                return Math.Max(0, wait);
            }
        }
    }
}
