using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Threading.Tasks;
using Xunit;
using static Kvasir.Block.Tests.PeerAgreement;

namespace Kvasir.Block.Tests;

/// <summary>
/// The same random disk is put by QEMU's tool into one image and by ours into another, of a random kind; then both are written to alike.
/// Both programs must find in both images the disk that is expected, and say the same of each (info, map, check, compare).
/// KVASIR_PEER_SECONDS says for how long (default: a few seconds), KVASIR_PEER_SEED where to begin.
/// </summary>
public sealed class RandomPeerImageTests
{
    private static readonly string[] Secret = ["--object", "secret,id=s,data=mellon"];

    [Fact]
    public async Task Images_of_either_program_are_the_same_to_both()
    {
        Peer.Need("qemu-img");
        TimeSpan limit = TimeSpan.FromSeconds(Setting("KVASIR_PEER_SECONDS", 10));
        int seed = Setting("KVASIR_PEER_SEED", 1000);
        Stopwatch spent = Stopwatch.StartNew();
        SortedDictionary<string, int> kinds = new(StringComparer.Ordinal);
        List<string> failures = [];
        int done = 0;
        do
        {
            using TestFolder folder = new(inMemory: true);
            Session session = new(folder, seed + done);
            try
            {
                await session.RunAsync();
            }
            catch (Exception error)
            {
                failures.Add($"seed {seed + done} (KVASIR_PEER_SEED), {session.Kind}: {error.Message}");
            }
            kinds[session.Kind] = kinds.GetValueOrDefault(session.Kind) + 1;
            done++;
        }
        while (spent.Elapsed < limit && failures.Count < 20);
        TestContext.Current.TestOutputHelper?.WriteLine($"{done} images of each program from seed {seed} on: {string.Join(", ", kinds.Select(k => $"{k.Key} {k.Value}"))}");
        Assert.True(failures.Count == 0, string.Join("\n\n", failures));
    }

    private sealed class Session(TestFolder folder, int seed)
    {
        private readonly Random _random = new(seed);
        private readonly List<string> _history = [];
        private string _format = "qcow2";
        private bool _encrypted;
        private bool _writable = true;
        private bool _resizes;
        private bool _counts = true;
        private long _size;

        /// <summary>What was tried, for the count.</summary>
        public string Kind { get; private set; } = "qcow2";

        public async Task RunAsync()
        {
            Directory.CreateDirectory(folder["q"]);
            Directory.CreateDirectory(folder["k"]);
            try
            {
                await MakeDiskAsync();
                await ConvertAsync();
                await LookAsync();
                if (_writable)
                {
                    await WriteAsync();
                    await LookAsync();
                }
            }
            catch (Exception error)
            {
                throw new InvalidOperationException($"{error.Message}\nafter:\n  {string.Join("\n  ", _history)}", error);
            }
        }

        private async Task MakeDiskAsync()
        {
            _size = _random.Next(1, 6000) * 512L;
            byte[] disk = new byte[_size];
            for (int at = 0; at < disk.Length;)
            {
                int run = Math.Min(disk.Length - at, _random.Next(1, _random.Next(2) == 0 ? 3000 : 400_000));
                switch (_random.Next(4))
                {
                    case 0:
                        _random.NextBytes(disk.AsSpan(at, run));
                        break;
                    case 1:
                        disk.AsSpan(at, run).Fill((byte)_random.Next(256));
                        break;
                    default:
                        break;
                }
                at += run;
            }
            await File.WriteAllBytesAsync(folder["disk"], disk);
        }

        private async Task ConvertAsync()
        {
            List<string> words = ["img", "convert", "-f", "raw"];
            string options = Choose(words);
            if (_random.Next(4) == 0 && !words.Contains("-c"))
                words.AddRange(["-S", Pick("0", "512", "4k", "64k")]);
            if (_random.Next(3) == 0)
                words.AddRange(["-m", Pick("1", "2", "8")]);
            words.AddRange(["-O", _format]);
            if (options.Length > 0)
                words.AddRange(["-o", options]);
            await BothAsync([.. words, folder["disk"], "@image"]);
        }

        /// <summary>A format and how its image is laid out; what else the command line needs is added to it.</summary>
        private string Choose(List<string> words)
        {
            switch (_random.Next(16))
            {
                case 0:
                    return Is("vmdk", "monolithicSparse", "subformat=monolithicSparse" + Pick(string.Empty, ",zeroed_grain=on", ",adapter_type=lsilogic"));
                case 1:
                    return Is("vmdk", "monolithicFlat", "subformat=monolithicFlat");
                case 2:
                    _writable = false;
                    if (_random.Next(2) == 0)
                        words.Add("-c");
                    return Is("vmdk", "streamOptimized", "subformat=streamOptimized");
                case 3:
                    return Is("vdi", "dynamic", string.Empty);
                case 4:
                    return Is("vdi", "static", "static=on");
                case 5:
                    return Is("vpc", "dynamic", "force_size=on");
                case 6:
                    return Is("vpc", "fixed", "force_size=on,subformat=fixed");
                case 7:
                    return Is("vhdx", "dynamic", Pick("subformat=dynamic", "block_size=1M", "block_size=2M,log_size=2M"));
                case 8:
                    return Is("vhdx", "fixed", "subformat=fixed,block_size=1M");
                case 9:
                    _encrypted = true;
                    words.AddRange(Secret);
                    return Is("luks", "plain", "key-secret=s,iter-time=10" + Cipher(string.Empty));
                case 10:
                    _encrypted = true;
                    words.AddRange(Secret);
                    return Is("qcow2", "encrypted", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" + Cipher("encrypt.") + ",cluster_size=" + Pick("4k", "64k", "512k"));
                case 11 or 12:
                    words.Add("-c");
                    _resizes = true;
                    string method = Pick("zlib", "zstd");
                    return Is("qcow2", "compressed " + method, Layout(false) + ",compression_type=" + method);
                case 13:
                    return Is("qcow2", "data file", "data_file=@data" + Pick(string.Empty, ",data_file_raw=on"));
                case 14:
                    return Is("qcow2", "preallocated", Layout(true) + ",preallocation=" + Pick("metadata", "falloc", "full"));
                default:
                    _resizes = true;
                    return Is("qcow2", "plain", Layout(true));
            }
        }

        private string Is(string format, string variant, string options)
        {
            _format = format;
            Kind = $"{format} {variant}";
            return options;
        }

        private string Cipher(string prefix) => _random.Next(3) == 0
            ? string.Empty
            : $",{prefix}cipher-alg={Pick("aes-128", "aes-256")}" + Pick(
                $",{prefix}cipher-mode=xts,{prefix}ivgen-alg=plain64",
                $",{prefix}cipher-mode=cbc,{prefix}ivgen-alg=plain64",
                $",{prefix}cipher-mode=cbc,{prefix}ivgen-alg=essiv,{prefix}ivgen-hash-alg=sha256",
                $",{prefix}cipher-mode=xts,{prefix}ivgen-alg=plain64,{prefix}hash-alg=" + Pick("sha1", "sha256", "sha512"));

        private string Layout(bool old)
        {
            if (old && _random.Next(5) == 0)
                return "compat=0.10,cluster_size=" + Pick("512", "4k", "64k", "2M");
            if (_random.Next(4) == 0)
                return "extended_l2=on,cluster_size=" + Pick("16k", "64k", "256k", "2M");
            string bits = Pick("1", "2", "4", "8", "16", "16", "32", "64");
            _counts = bits is not ("1" or "2" or "4");
            return "cluster_size=" + Pick("512", "1k", "2k", "4k", "16k", "64k", "64k", "1M", "2M") + ",refcount_bits=" + bits
                + Pick(string.Empty, string.Empty, ",lazy_refcounts=on");
        }

        private async Task WriteAsync()
        {
            List<string> commands = [];
            int count = _random.Next(1, 8);
            for (int i = 0; i < count; i++)
            {
                // Within a block of each format and across; at odd places too.
                long unit = Pick("1", "512", "4096", "65536") is string text ? long.Parse(text, System.Globalization.CultureInfo.InvariantCulture) : 1;
                unit = Math.Min(unit, _size);
                long at = _random.NextInt64(0, Math.Max(1, _size / unit)) * unit;
                long length = Math.Min(_size - at, _random.Next(1, 30) * (unit == 1 ? 3001 : unit));
                commands.AddRange(["-c", $"{Pick("write", "write", "write -f", "writev")} -P {_random.Next(1, 256)} {at} {length}"]);
                if (_random.Next(4) == 0)
                    commands.AddRange(["-c", $"write -z{Pick(string.Empty, " -u")} {at} {length}"]);
            }
            _history.Add("io " + string.Join(' ', commands));
            (int code, string text2) = await Peer.IoAsync(["-f", "raw", .. commands, folder["disk"]]);
            Assert.True(code == 0, text2);
            await BothAsync(["io", .. commands, .. Open("@image", "-f")]);
            if (!_resizes)
                return;
            switch (_random.Next(5))
            {
                case 0 when _counts:
                    await BothAsync("img", "snapshot", "-c", "one", "@image");
                    await BothAsync("io", "-c", $"write -P 77 0 {_size}", "@image");
                    await BothAsync("img", "snapshot", "-a", "one", "@image");
                    break;
                case 1:
                    await BothAsync("img", "resize", "-q", "-f", "qcow2", "@image", "+1M");
                    Assert.Equal(0, (await Peer.ImgAsync("resize", "-q", "-f", "raw", folder["disk"], "+1M")).Code);
                    _size += 1 << 20;
                    break;
                case 2:
                    foreach (string side in new[] { "q", "k" })
                        File.Move(folder[side + "/image"], folder[side + "/base"]);
                    await BothAsync("img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "@image");
                    await BothAsync("io", "-c", $"write -P 99 {_size / 3} {Math.Max(1, _size / 5)}", "-c", $"write -z 0 {Math.Max(1, _size / 7)}", "@image");
                    Assert.Equal(0, (await Peer.IoAsync("-f", "raw", "-c", $"write -P 99 {_size / 3} {Math.Max(1, _size / 5)}", "-c", $"write -z 0 {Math.Max(1, _size / 7)}", folder["disk"])).Code);
                    break;
                default:
                    break;
            }
        }

        /// <summary>Both programs look at both images.</summary>
        private async Task LookAsync()
        {
            foreach (string side in new[] { "q", "k" })
            {
                string image = folder[side + "/image"];
                string[] open = Open(image, "-f");
                await AgreeAsync("info", "-f", _format, image);
                await AgreeAsync("info", "-f", _format, "--output=json", image);
                if (_format is "qcow2" or "vdi" or "vmdk" or "vhdx")
                {
                    (int found, string text) = await AgreeAsync(["check", "--output=json", .. open]);
                    Assert.True(found == 0, $"{side}: check gave {found}: {text}");
                }
                // QEMU knows neither where a block of a VHDX lies nor which ones are absent.
                if (_format is not "vhdx")
                    await AgreeAsync(["map", "--output=json", .. open]);
                string[] two = _encrypted
                    ? [.. Secret, "--image-opts", $"driver=raw,file.filename={folder["disk"]}", open[^1]]
                    : ["-f", "raw", "-F", _format, folder["disk"], image];
                (int code, string answer) = await AgreeAsync(["compare", .. two]);
                Assert.True(code == 0, $"{side}: {answer}");
            }
        }

        private string[] Open(string image, string option) => _encrypted
            ? [.. Secret, "--image-opts", $"driver={_format},file.filename={image},{(_format == "luks" ? string.Empty : "encrypt.")}key-secret=s"]
            : [option, _format, image];

        /// <summary>The same command by QEMU's program in its folder and by ours in its own; "@" stands for the folder.</summary>
        private async Task BothAsync(params string[] words)
        {
            _history.Add(string.Join(' ', words));
            (int code, string text) = await Peer.RunAsync("qemu-" + words[0], Array.ConvertAll(words[1..], w => w.Replace("@", folder["q/"], StringComparison.Ordinal)));
            string[] own = Array.ConvertAll(words[1..], w => w.Replace("@", folder["k/"], StringComparison.Ordinal));
            (int ownCode, string ownText) = words[0] == "img" ? await Peer.ImgAsync(own) : await Peer.IoAsync(own);
            Assert.True(code == 0 && ownCode == 0, $"{string.Join(' ', words)}: QEMU {code}, own {ownCode}\n--- QEMU\n{text}\n--- own\n{ownText}");
        }

        private string Pick(params string[] choices) => choices[_random.Next(choices.Length)];
    }
}
