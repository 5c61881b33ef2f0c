using System;
using System.Globalization;
using System.Linq;
using Kvasir.Block;
using Kvasir.Devices.Storage;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary><c>--disk PATH[,key=value...]</c>. A comma in the path is doubled. What concerns the image is understood by <see cref="BackendOptions"/>.</summary>
internal static class DiskOption
{
    private const int LongestSerial = 20;

    /// <exception cref="CommandException">A key is not known, or a value is bad.</exception>
    public static DiskConfiguration Parse(string text, int number, string prefix = "disk")
    {
        try
        {
            ImageOptions words = ImageOptions.ParseList(text, "file");
            string path = Take(words, "file") is { Length: > 0 } given ? given : throw Bad("the path is missing; write --disk PATH[,key=value]");
            BackendOptions image = new BackendOptions { Probe = true }.Apply(words);
            DiskSettings settings = new()
            {
                Name = Take(words, "id") is { } id ? Name(id) : string.Create(CultureInfo.InvariantCulture, $"{prefix}{number}"),
                Serial = Take(words, "serial") is { } serial ? Serial(serial) : "",
                LogicalBlock = BlockSize(words, "logical-block", 512),
                PhysicalBlock = BlockSize(words, "physical-block", 4096),
                WriteError = Policy(words, "werror", ErrorPolicy.StopOnNoSpace),
                ReadError = Policy(words, "rerror", ErrorPolicy.Report),
            };
            DiskConfiguration disk = new()
            {
                Path = path,
                Options = image,
                Settings = settings,
                Bus = Bus(Take(words, "bus")),
                Queues = Queues(Take(words, "queues")),
                BootIndex = BootIndex(Take(words, "bootindex")),
            };
            string? unknown = words.Values.FirstOrDefault(pair => pair.Value is not null).Key;
            if (unknown is not null)
                throw Bad($"'{unknown}' is not known; there are format, bus, readonly, snapshot, cache, aio, discard, detect-zeroes, serial, id, queues, bootindex, logical-block, physical-block, werror, rerror, bps, iops");
            return disk;
        }
        catch (BlockException error)
        {
            throw new CommandException(ExitCode.Usage, $"--disk: {error.Message}", error);
        }
    }

    /// <summary><c>--cdrom PATH</c>: a CD in a drive of the SCSI controller.</summary>
    public static DiskConfiguration ParseCd(string path, int number) => new()
    {
        Path = path.Length > 0 ? path : throw new CommandException(ExitCode.Usage, "--cdrom: the path is missing"),
        Options = new BackendOptions { Format = "raw", ReadOnly = true },
        Settings = new DiskSettings { Name = string.Create(CultureInfo.InvariantCulture, $"cd{number}"), IsCd = true, PhysicalBlock = 2048 },
        Bus = DiskBus.Scsi,
    };

    private static string? Take(ImageOptions words, string key)
    {
        string? value = words[key];
        words[key] = null;
        return value;
    }

    private static DiskBus Bus(string? value) => value switch
    {
        null or "virtio" => DiskBus.Virtio,
        "scsi" => DiskBus.Scsi,
        _ => throw Bad($"bus: '{value}' is neither virtio nor scsi"),
    };

    private static int Queues(string? value) => value is null ? 0
        : int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int queues) && queues is >= 1 and <= 64 ? queues
        : throw Bad($"queues: '{value}' is no number from 1 to 64");

    private static int? BootIndex(string? value) => value is null ? null
        : int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int index) ? index
        : throw Bad($"bootindex: '{value}' is no number");

    private static string Name(string value) =>
        value.Length is > 0 and <= 32 && value.All(c => char.IsAsciiLetterOrDigit(c) || c is '-' or '_' or '.') ? value : throw Bad($"id: '{value}' is no name");

    private static string Serial(string value) =>
        value.Length is > 0 and <= LongestSerial && value.All(c => c is > ' ' and < '\x7f') ? value : throw Bad($"serial: '{value}' is not 1 to {LongestSerial} printable characters");

    private static ErrorPolicy Policy(ImageOptions words, string key, ErrorPolicy otherwise) => Take(words, key) switch
    {
        null => otherwise,
        "report" => ErrorPolicy.Report,
        "ignore" => ErrorPolicy.Ignore,
        "stop" => ErrorPolicy.Stop,
        "enospc" => ErrorPolicy.StopOnNoSpace,
        { } value => throw Bad($"{key}: '{value}' is none of report, ignore, stop, enospc"),
    };

    private static int BlockSize(ImageOptions words, string key, int otherwise) => Take(words, key) is not { } value ? otherwise
        : int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int size) && size is >= 512 and <= 65536 && (size & (size - 1)) == 0 ? size
        : throw Bad($"{key}: '{value}' is no power of two from 512 to 65536");

    private static CommandException Bad(string message) => new(ExitCode.Usage, $"--disk: {message}");
}
