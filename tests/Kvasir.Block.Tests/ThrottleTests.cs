using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Rates and bursts of throttled disks, by a clock that the test turns.</summary>
public sealed class ThrottleTests
{
    private readonly ManualClock _clock = new();
    private int _started;

    [Theory]
    [InlineData(100, 0.1)]
    [InlineData(5000, 0.1)]
    [InlineData(40, 2.5)]
    public void After_a_burst_requests_start_at_the_rate(double rate, double burst)
    {
        ThrottleGroup group = new(new ThrottleLimits { RequestsPerSecond = rate, BurstSeconds = burst }, _clock);
        int all = (int)(rate * (burst + 12));
        Begin(group, all, isWrite: false, 4096);
        // What finds the level at the burst's mark passes it.
        int atOnce = (int)(rate * burst) + 1;
        // Waits are whole milliseconds, and less than one is none.
        int millisecond = (int)(rate / 1000);
        Assert.InRange(_started, atOnce, atOnce + millisecond);
        for (int second = 1; second <= 10; second++)
        {
            _clock.Advance(TimeSpan.FromSeconds(1));
            Assert.InRange(_started - atOnce, rate * second - 1, rate * second + 1 + millisecond);
        }
        // A rest brings the burst back, and no more than that.
        _clock.Advance(TimeSpan.FromSeconds(60));
        Assert.Equal(all, _started);
        Begin(group, all, isWrite: false, 4096);
        Assert.InRange(_started, all + atOnce, all + atOnce + millisecond);
    }

    [Theory]
    [InlineData(1_000_000, 4096)]
    [InlineData(1_000_000, 300_000)]
    [InlineData(200_000_000, 65536)]
    public void Bytes_one_request_after_the_other_flow_at_the_rate(double rate, int largest)
    {
        ThrottleGroup group = new(new ThrottleLimits { BytesPerSecond = rate }, _clock);
        Random random = new(11);
        long before = 0;
        TimeSpan start = TimeSpan.Zero;
        for (int round = 0; round < 4000; round++)
        {
            int bytes = random.Next(512, largest);
            Task wait = group.WaitAsync(round % 3 == 0, bytes, CancellationToken.None).AsTask();
            while (!wait.IsCompleted)
                _clock.AdvanceToNextTimer();
            Assert.True(wait.IsCompletedSuccessfully);
            // The burst is used up.
            if (round == 1500)
                (before, start) = (0, _clock.Elapsed);
            before += bytes;
        }
        double seconds = (_clock.Elapsed - start).TotalSeconds;
        Assert.InRange(before / seconds / rate, 0.99, 1.01);
    }

    [Fact]
    public void Limits_of_one_direction_leave_the_other_alone_and_totals_are_shared()
    {
        ThrottleGroup group = new(new ThrottleLimits { ReadRequestsPerSecond = 100, RequestsPerSecond = 1000, BurstSeconds = 0.1 }, _clock);
        Begin(group, 500, isWrite: false, 512);
        Assert.Equal(11, _started);
        // The reads that wait have taken their part of the total already: a hundred and one of both kinds pass in a burst of it.
        Begin(group, 500, isWrite: true, 512);
        Assert.Equal(11, _started);
        _clock.Advance(TimeSpan.FromMilliseconds(400));
        Assert.InRange(_started, 11 + 39, 11 + 41);
        // 500 of the total in half a second: from then on the writes go, a thousand a second.
        _clock.Advance(TimeSpan.FromMilliseconds(100));
        Assert.InRange(_started, 11 + 49 + 99, 11 + 51 + 102);
        _clock.Advance(TimeSpan.FromMilliseconds(300));
        Assert.InRange(_started, 11 + 79 + 399, 11 + 81 + 402);
    }

    [Fact]
    public async Task A_wait_can_be_ended()
    {
        ThrottleGroup group = new(new ThrottleLimits { RequestsPerSecond = 1, BurstSeconds = 0.1 }, _clock);
        using CancellationTokenSource cancel = new();
        Assert.True(group.WaitAsync(false, 0, cancel.Token).AsTask().IsCompletedSuccessfully);
        Task second = group.WaitAsync(false, 0, cancel.Token).AsTask();
        Assert.False(second.IsCompleted);
        await cancel.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => second);
    }

    [Fact]
    public void A_burst_runs_at_its_rate_for_its_time_and_is_earned_back_at_the_average()
    {
        ThrottleGroup group = new(new ThrottleLimits { RequestsPerSecond = new ThrottleRate(10, 200, 6) }, _clock);
        Begin(group, 1395, isWrite: false, 512);
        // A tenth of a second's worth of the burst at once, then the burst's rate, until 1200 more than leaked are taken.
        Assert.Equal(21, _started);
        for (int second = 1; second <= 20; second++)
        {
            _clock.Advance(TimeSpan.FromSeconds(1));
            int expected = Math.Min(1395, 1 + (int)Math.Min(20 + (200.0 * second), 1200 + (10.0 * second)));
            Assert.InRange(_started, expected - 1, expected + 1);
        }
        // Of what was taken 100 leak in ten seconds of rest: they may come as a burst again.
        ThrottleGroup second1 = new(new ThrottleLimits { WriteRequestsPerSecond = new ThrottleRate(10, 200, 6) }, _clock);
        _started = 0;
        Begin(second1, 1201, isWrite: true, 512);
        _clock.Advance(TimeSpan.FromSeconds(10));
        Assert.Equal(1201, _started);
        Begin(second1, 200, isWrite: true, 512);
        _clock.Advance(TimeSpan.FromSeconds(1));
        Assert.InRange(_started, 1201 + 105, 1201 + 115);
    }

    [Fact]
    public void A_burst_of_a_second_may_be_taken_at_once()
    {
        ThrottleGroup group = new(new ThrottleLimits { BytesPerSecond = new ThrottleRate(1000, 64_000) }, _clock);
        Begin(group, 200, isWrite: true, 1000);
        Assert.Equal(65, _started);
        _clock.Advance(TimeSpan.FromSeconds(10));
        Assert.Equal(75, _started);
    }

    [Fact]
    public void Large_requests_count_as_several()
    {
        foreach ((long bytes, double counted) in ((long, double)[])[(512, 1), (4096, 1), (6144, 1.5), (40960, 10)])
        {
            ManualClock clock = new();
            ThrottleGroup group = new(new ThrottleLimits { RequestsPerSecond = 100, RequestSize = 4096 }, clock);
            _started = 0;
            Begin(group, 500, isWrite: false, bytes);
            int atOnce = _started;
            clock.Advance(TimeSpan.FromSeconds(2));
            Assert.InRange((_started - atOnce) * counted, 198, 202);
        }
    }

    [Fact]
    public async Task A_wait_of_years_is_one()
    {
        ThrottleGroup group = new(new ThrottleLimits { BytesPerSecond = 1 }, _clock);
        using CancellationTokenSource cancel = new();
        await group.WaitAsync(true, long.MaxValue, cancel.Token);
        Task second = group.WaitAsync(true, 1, cancel.Token).AsTask();
        _clock.Advance(TimeSpan.FromDays(10_000));
        Assert.False(second.IsCompleted);
        await cancel.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => second);
    }

    [Fact]
    public void Bursts_come_from_a_groups_options_and_from_a_disks()
    {
        ThrottleLimits group = ThrottleLimits.FromOptions(ImageOptions.ParseList("x-iops-total=10,x-iops-total-max=200,x-iops-total-max-length=6,limits.iops-size=4096"));
        Assert.Equal((new ThrottleRate(10, 200, 6), 4096), (group.RequestsPerSecond, group.RequestSize));
        ImageOptions disk = ImageOptions.ParseList("file=a,bps_wr=1M,bps_wr_max=2M,throttling.bps-write-max-length=3");
        BackendOptions options = new BackendOptions().Apply(disk);
        Assert.Equal(new ThrottleRate(1 << 20, 2 << 20, 3), options.Throttle!.WriteBytesPerSecond);
        Assert.Equal(["file"], disk.Values.Keys);
    }

    private void Begin(ThrottleGroup group, int count, bool isWrite, long bytes)
    {
        for (int i = 0; i < count; i++)
            _ = StartAsync(group.WaitAsync(isWrite, bytes, CancellationToken.None));
    }

    private async Task StartAsync(ValueTask wait)
    {
        await wait.ConfigureAwait(false);
        _started++;
    }

    /// <summary>Time that passes when the test says so. Timers run within the call that turns the clock.</summary>
    private sealed class ManualClock : TimeProvider
    {
        private readonly PriorityQueue<ManualTimer, (long Due, long Order)> _timers = new();
        private long _order;
        private long _now;

        public override long TimestampFrequency => TimeSpan.TicksPerSecond;

        public TimeSpan Elapsed => new(_now);

        public override long GetTimestamp() => _now;

        public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period)
        {
            ManualTimer timer = new(callback, state);
            if (dueTime != Timeout.InfiniteTimeSpan)
                _timers.Enqueue(timer, (_now + dueTime.Ticks, _order++));
            return timer;
        }

        public void Advance(TimeSpan time)
        {
            long end = _now + time.Ticks;
            while (_timers.TryPeek(out _, out (long Due, long Order) next) && next.Due <= end)
                AdvanceToNextTimer();
            _now = end;
        }

        public void AdvanceToNextTimer()
        {
            if (!_timers.TryDequeue(out ManualTimer? timer, out (long Due, long Order) at))
                throw new InvalidOperationException("nothing waits for time to pass");
            _now = Math.Max(_now, at.Due);
            timer.Fire();
        }
    }

    private sealed class ManualTimer(TimerCallback callback, object? state) : ITimer
    {
        private bool _disposed;

        public void Fire()
        {
            if (_disposed)
                return;
            // What waited goes on within the call.
            SynchronizationContext? context = SynchronizationContext.Current;
            SynchronizationContext.SetSynchronizationContext(null);
            callback(state);
            SynchronizationContext.SetSynchronizationContext(context);
        }

        public bool Change(TimeSpan dueTime, TimeSpan period) => throw new NotSupportedException();

        public void Dispose() => _disposed = true;

        public ValueTask DisposeAsync()
        {
            Dispose();
            return default;
        }
    }
}
