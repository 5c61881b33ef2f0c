using System;

namespace Kvasir.Block.Filters;

/// <summary>A rate, and how far it may be exceeded for a while.</summary>
/// <param name="Average">What it comes to in the long run, in a second; 0: no limit.</param>
/// <param name="Most">In a second of a burst; 0: no bursts beyond a tenth of a second's worth at once.</param>
/// <param name="MostSeconds">How long a burst may last. With one second its whole worth may be taken at once.</param>
public readonly record struct ThrottleRate(double Average, double Most = 0, double MostSeconds = 1)
{
    public static implicit operator ThrottleRate(double average) => new(average);
}

/// <summary>Limits of a throttle group, with QEMU's meaning of bursts (docs/throttle.txt): a bucket that leaks at the average.</summary>
public sealed record ThrottleLimits
{
    private const double LargestRate = 1e15;
    private static readonly string[] s_prefixes = ["limits.", "throttling.", "x-"];
    private static readonly (string Long, string Short)[] s_names =
        [("bps-total", "bps"), ("bps-read", "bps_rd"), ("bps-write", "bps_wr"), ("iops-total", "iops"), ("iops-read", "iops_rd"), ("iops-write", "iops_wr")];

    public ThrottleRate BytesPerSecond { get; init; }

    public ThrottleRate ReadBytesPerSecond { get; init; }

    public ThrottleRate WriteBytesPerSecond { get; init; }

    public ThrottleRate RequestsPerSecond { get; init; }

    public ThrottleRate ReadRequestsPerSecond { get; init; }

    public ThrottleRate WriteRequestsPerSecond { get; init; }

    /// <summary>Requests of more bytes than this count as several; 0: each counts once.</summary>
    public double RequestSize { get; init; }

    /// <summary>Seconds of the full rate that may be used up at once where no burst is named.</summary>
    public double BurstSeconds { get; init; } = 0.1;

    /// <summary>Whether anything is limited.</summary>
    public bool IsLimited =>
        BytesPerSecond.Average + ReadBytesPerSecond.Average + WriteBytesPerSecond.Average + RequestsPerSecond.Average + ReadRequestsPerSecond.Average + WriteRequestsPerSecond.Average > 0;

    /// <summary>Whether an option is one of a limit's: "limits.bps-total", "throttling.iops-read-max", "bps_wr_max_length", ...</summary>
    public static bool IsOption(string key)
    {
        foreach (string prefix in s_prefixes)
        {
            if (key.StartsWith(prefix, StringComparison.Ordinal))
                return IsLong(key[prefix.Length..]);
        }
        foreach ((_, string name) in s_names)
        {
            if (key == name || key == name + "_max" || key == name + "_max_length")
                return true;
        }
        return key == "iops_size";

        static bool IsLong(string key)
        {
            foreach ((string name, _) in s_names)
            {
                if (key == name || key == name + "-max" || key == name + "-max-length")
                    return true;
            }
            return key is "iops-size" or "burst-seconds";
        }
    }

    /// <summary>Reads QEMU's names of the limits: "limits.bps-total", "throttling.iops-read-max", "bps_wr", ...</summary>
    /// <exception cref="BlockException">The limits contradict each other, or are out of range.</exception>
    public static ThrottleLimits FromOptions(ImageOptions options)
    {
        ThrottleRate[] rates = new ThrottleRate[s_names.Length];
        for (int i = 0; i < rates.Length; i++)
            rates[i] = Rate(options, s_names[i].Long, s_names[i].Short);
        for (int total = 0; total < rates.Length; total += 3)
        {
            if ((rates[total].Average > 0 && (rates[total + 1].Average > 0 || rates[total + 2].Average > 0)) || (rates[total].Most > 0 && (rates[total + 1].Most > 0 || rates[total + 2].Most > 0)))
                throw new BlockException("bps/iops/max total values and read/write values cannot be used at the same time");
        }
        foreach (ThrottleRate rate in rates)
            Check(rate);
        double size = Get(options, "iops-size", "iops_size") ?? 0;
        if (size > 0 && rates[3].Average + rates[4].Average + rates[5].Average == 0)
            throw new BlockException("iops size requires an iops value to be set");
        double length = options.Size("limits.burst-seconds") ?? 0;
        return new ThrottleLimits
        {
            BytesPerSecond = rates[0],
            ReadBytesPerSecond = rates[1],
            WriteBytesPerSecond = rates[2],
            RequestsPerSecond = rates[3],
            ReadRequestsPerSecond = rates[4],
            WriteRequestsPerSecond = rates[5],
            RequestSize = size,
            BurstSeconds = length > 0 ? length : 0.1,
        };
    }

    private static long? Get(ImageOptions options, string name, string shortName)
    {
        foreach (string prefix in s_prefixes)
        {
            if (options.Size(prefix + name) is long value)
                return value;
        }
        return options.Size(shortName);
    }

    private static ThrottleRate Rate(ImageOptions options, string name, string shortName)
    {
        ThrottleRate rate = new(Get(options, name, shortName) ?? 0, Get(options, name + "-max", shortName + "_max") ?? 0, Get(options, name + "-max-length", shortName + "_max_length") ?? 1);
        return rate.MostSeconds > 0 ? rate : throw new BlockException("the burst length cannot be 0");
    }

    private static void Check(ThrottleRate rate)
    {
        if (rate.Average > LargestRate || rate.Most > LargestRate)
            throw new BlockException("bps/iops/max values must be within [0, 1000000000000000]");
        if (rate.Most > 0 && rate.Average == 0)
            throw new BlockException("bps_max/iops_max require corresponding bps/iops values");
        if (rate.Most > 0 && rate.Most < rate.Average)
            throw new BlockException("bps_max/iops_max cannot be lower than bps/iops");
        if (rate.MostSeconds > 1 && rate.Most == 0)
            throw new BlockException("burst length set without burst rate");
        if (rate.MostSeconds > LargestRate / Math.Max(1, rate.Most))
            throw new BlockException("burst length too high for this burst rate");
    }
}
