using System;
using System.Collections.Generic;
using System.IO;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>
/// Command lines given to QEMU's tool and to ours, each in a folder of its own: output and code must be the same, and so must what becomes
/// of the files. Each list is run in order, so that later lines see what earlier ones did; "@" stands for the folder.
/// </summary>
public sealed partial class PeerCommandTests
{
    [Fact]
    public async Task Create_and_info() => await SameAsync(
        "img create -f qcow2 @a 10M",
        "img create -q -f qcow2 @a 10M",
        "img create -f raw @r 1M",
        "img create -f qcow2 -o size=3M,cluster_size=4k @b",
        "img create -f qcow2 -b a -F qcow2 @c",
        "img create -f qcow2 -b a @d",
        "img create -u -f qcow2 -b none -F raw @d 1G",
        "img create -f qcow2 -b none -F raw @e 1G",
        "img create -f qcow2 @e",
        "img create -f qcow2 @e nonsense",
        "img create -f qcow2 @e -1",
        "img create -f qcow2 -o cluster_size=3k @e 1M",
        "img create -f qcow2 -o refcount_bits=3 @e 1M",
        "img create -f qcow2 -o compat=0.10,lazy_refcounts=on @e 1M",
        "img create -f qcow2 -o compat=0.10,refcount_bits=8 @e 1M",
        "img create -f qcow2 -o nothing=1 @e 1M",
        "img create -f nothing @e 1M",
        "img create -f raw -o preallocation=metadata @e 1M",
        "img create -f raw -b a -F qcow2 @e 1M",
        "img create -f vdi @v 5M",
        "img create -f vmdk @m 5M",
        "img create -f vhdx @h 5M",
        "img create -f vpc -o force_size=on @p 5M",
        "img create",
        "img create -f qcow2 @e 1M 2M",
        "img info @a", "img info --output=json @b", "img info --backing-chain @c", "img info --output=json --backing-chain @c", "img info @r", "img info @v", "img info @h", "img info @p",
        "img info @none", "img info", "img -T foo --trace=bar -Tenable=baz info @none", "img -T", "img -T foo", "io -T foo -c length @none", "img info -f qcow2 @r", "img info --output=xml @a", "img info -f nothing @a");

    [Fact]
    public async Task Objects_with_parameters_that_they_do_not_have() => await SameAsync(
        "img create -q -f raw @r 1M",
        "io --object secret,id=s,data=x,foo=1 -c length @r",
        "io --object secret,id=s -c length @r",
        "io --object secret,data=x -c length @r",
        "io --object secret,id=s,data=x,format=hex -c length @r",
        "io --object secret,id=s,data=x,file=y -c length @r",
        "io --object tls-creds-x509,id=t,dir=/x,foo=1 -c length @r",
        "io --object throttle-group,id=g,bar=2 -c length @r",
        "img info --object secret,id=s,data=x,foo=1 @r");

    /// <summary>Images that only QEMU writes: what our check counts of them.</summary>
    [Theory]
    [InlineData("qed")]
    [InlineData("parallels")]
    public async Task Check_says_how_much_is_allocated(string format)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        foreach ((int round, string size) in ((int, string)[])[(0, "10M"), (1, "3000000k"), (2, "65k"), (3, "0")])
        {
            string path = folder[$"a{round}"];
            await Peer.OkAsync("qemu-img", "create", "-q", "-f", format, path, size);
            await SameAsync(path);
            if (round < 2)
                await Peer.OkAsync("qemu-io", "-f", format, "-c", "write 0 64k", "-c", "write 3M 128k", "-c", "write 1M 64k", "-c", "write 64k 64k", "-c", "write -z 4M 64k", "-c", "write 9M 1M", path);
            if (round == 1)
                await Peer.OkAsync("qemu-io", "-f", format, "-c", "write 2047M 3M", "-c", "write 2900M 1k", path);
            await SameAsync(path);
        }

        static async Task SameAsync(string path)
        {
            foreach (string[] line in (string[][])[["check", path], ["check", "--output=json", path]])
                Assert.Equal(await Peer.RunAsync("qemu-img", line), await Peer.ImgAsync(line));
        }
    }

    [Fact]
    public async Task Throttle_groups() => await SameAsync(
        "img create -q -f raw @r 1M",
        "io --object throttle-group,id=g,x-iops-total=10,x-iops-total-max=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,limits.iops-total-max=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,x-iops-total=10,x-iops-total-max-length=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,limits.iops-total=10,limits.iops-total-max=20,limits.iops-total-max-length=0 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,limits.iops-size=4096 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,x-iops-total=10,x-iops-read=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,x-iops-total=10,x-iops-total-max=100,x-iops-read-max=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,x-foo=1 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,x-bps-total=10,x-bps-total-max=100000000,x-bps-total-max-length=100000000 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,limits.bps-read=9999999999999999 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length",
        "io --object throttle-group,id=g,limits.iops-size=4096,limits.iops-total=10,limits.iops-total-max=100,limits.iops-total-max-length=5 --image-opts driver=throttle,throttle-group=g,file.filename=@r -c length");

    [Fact]
    public async Task Io_map_and_check() => await SameAsync(
        "img create -q -f qcow2 @base 4M",
        "io -c 'write -P 1 0 1M' -c 'write -P 2 3M 128k' @base",
        "img create -q -f qcow2 -b base -F qcow2 @a",
        "io -f qcow2 -c 'write -P 3 512k 64k' -c 'discard 3M 64k' -c 'read -P 1 0 512k' -c 'read -P 3 512k 64k' -c 'read -P 9 512k 512' @a",
        "io -r -f qcow2 -c 'read -v 524284 16' @a",
        "io -f qcow2 -c 'alloc 0 1M' -c 'alloc 512k 64k' -c 'map' -c 'length' @a",
        "io -f qcow2 -c 'write 4M 512' -c 'write 0 -1' -c 'write x 512' -c 'write' -c 'nothing' -c 'read 0 3G' @a",
        "io -r -f qcow2 -c 'write 0 512' @a",
        "io -f qcow2 -c 'writev -P 7 2M 4k 4k 8k' -c 'readv -P 7 2M 8k 8k' -c 'aio_write -P 8 2M 4k' -c 'aio_flush' -c 'read -P 8 2M 4k' -c 'flush' -c 'truncate 5M' -c 'length' @a",
        "img map @a", "img map --output=json @a", "img map --output=json -s 1M -l 2M @a", "img map --output=json @base", "img map @none",
        "img check @a", "img check --output=json @a", "img check -q @a", "img check -r leaks @a", "img check -r nothing @a", "img check @none", "img check -f raw @a",
        "img compare @a @a", "img compare @base @a", "img compare -s @base @a", "img compare -q @base @a", "img compare @a", "img compare @a @none",
        "img commit @a", "img compare @base @a", "img check -q @base");

    // Where a map is compared one request at a time (-m 1) keeps the order: else clusters come as data is ready.
    [Fact]
    public async Task Convert_and_measure() => await SameAsync(
        "img create -q -f raw @r 3M",
        "io -f raw -c 'write -P 5 128k 640k' -c 'write -P 6 2M 64k' @r",
        "img convert -m 1 -f raw -O qcow2 @r @q", "img map --output=json @q",
        "img convert -f raw -c -m 1 -O qcow2 @r @z", "img compare @r @z",
        "img convert -m 1 -S 0 -f raw -O qcow2 @r @full", "img map --output=json @full",
        "img convert -f qcow2 -O vmdk @q @m", "img compare -F vmdk @r @m",
        "img convert -f qcow2 -O raw -n @q @r",
        "img convert -f qcow2 -O raw -n @q @none",
        "img convert -f raw -O nothing @r @x", "img convert -f raw @r", "img convert", "img convert -f raw -O raw -c @r @x", "img convert -O qcow2 -o nothing=3 @r @x",
        "img convert -f qcow2 -O qcow2 -l snapshot.name=none @q @x", "img convert -S 513 -O raw @q @x", "img convert -m 17 -O raw @q @x", "img convert -m 0 -O raw @q @x",
        "img convert -m 1 -O qcow2 -B @r -F raw @q @over", "img map --output=json @over", "img info @over",
        "img measure -O qcow2 @r", "img measure -O qcow2 --output=json @q", "img measure -O qcow2 --size 10G", "img measure -O raw @q", "img measure -O nothing @q", "img measure", "img measure -O qcow2 --size 1M @q",
        "img dd -f raw -O qcow2 if=@r of=@dd bs=64k count=5", "img compare @dd @dd", "img info @dd", "img dd if=@r", "img dd if=@r of=@x bs=0", "img dd if=@none of=@x");

    [Fact]
    public async Task Snapshots_resizing_rebasing_and_bitmaps() => await SameAsync(
        "img create -q -f qcow2 @a 4M",
        "io -c 'write -P 1 0 1M' @a",
        "img snapshot -c one @a", "img snapshot -c one @a", "io -c 'write -P 2 0 1M' @a", "img snapshot -a one @a", "io -c 'read -P 1 0 1M' @a", "img snapshot -a none @a", "img snapshot -d none @a", "img snapshot -d one @a",
        "img snapshot -d one @a", "img snapshot -l @a", "img snapshot", "img snapshot -c a -d b @a", "img snapshot -l @none", "img check -q @a",
        "img resize @a 5M", "img resize @a +1M", "img resize @a -2M", "img resize --shrink @a -2M", "img resize @a 5", "img resize @a", "img resize @a x", "img resize @none 5M", "img resize --shrink @a -100M", "img info @a",
        "img resize --preallocation=full @a 6M", "img resize --preallocation=nothing @a 7M",
        "img create -q -f qcow2 -b a -F qcow2 @b", "img create -q -f qcow2 @c 6M", "io -c 'write -P 9 2M 1M' @c",
        "img rebase -b @c -F qcow2 @b", "img compare @a @b", "img rebase -u -b @none -F qcow2 @b", "img info @b", "img rebase -u -b '' @b", "img info @b", "img rebase @b",
        "img bitmap --add @a m", "img bitmap --add @a m", "img bitmap --add -g 4k @a n", "img bitmap --disable @a n", "img bitmap --enable @a n", "img bitmap --clear @a n", "img bitmap --merge m @a n", "img bitmap --merge none @a n", "img bitmap --remove @a n",
        "img bitmap --remove @a n", "img bitmap --add -g 5 @a o", "img bitmap @a m", "img bitmap --add @a", "img info @a", "img info --output=json @a",
        "img amend -f qcow2 -o compat=0.10 @c", "img amend -f qcow2 -o compat=1.1,lazy_refcounts=on @c", "img amend -f qcow2 -o cluster_size=4k @c", "img amend -f qcow2 -o nothing=1 @c", "img amend @c", "img info @c", "img check @c",
        "img create -q -f raw @r 2M", "img resize -f raw --shrink @r -- -1M", "img info -- @r", "img info @r -- @r", "img info --", "img create -q -f raw @x,y 1M", "img info --image-opts driver=raw,file.filename=@x,,y", "img create -f raw @e 16777217T", "img nothing", "img", "img create -X");

    [Fact]
    public async Task Filters_and_data_files() => await SameAsync(
        "img create -q -f raw @r 1M", "img create -q -f qcow2 @q 4M",
        "io -f raw -c 'break write_aio A' -c 'aio_write -P 1 0 4k' -c 'wait_break A' -c 'resume A' -c 'aio_flush' -c 'read -P 1 0 4k' blkdebug::@r",
        "io -f raw -c 'break read_aio A' -c 'aio_read -P 1 0 4k' -c 'wait_break A' -c 'remove_break A' -c 'aio_flush' blkdebug::@r",
        "io -f raw -c 'break nothing A' blkdebug::@r", "io -f raw -c 'resume A' blkdebug::@r", "io -f raw -c 'break read_aio A' @r", "io -f raw -c 'resume A' @r", "io -f raw -c 'remove_break A' @r",
        "io -c 'write -P 5 0 1M' @q",
        "io --image-opts driver=qcow2,file.filename=@q,detect-zeroes=unmap,discard=unmap -c 'write -P 0 0 512k'", "img map --output=json @q",
        "io --image-opts driver=qcow2,file.filename=@q,detect-zeroes=on -c 'write -P 0 512k 128k' -c 'read -P 0 512k 128k'", "img compare @q @q",
        "io --image-opts driver=qcow2,file.filename=@q,detect-zeroes=unmap -c 'write -P 0 0 512k'",
        "io --object throttle-group,id=g,x-iops-total=100000 --image-opts driver=throttle,throttle-group=g,file.driver=qcow2,file.file.driver=file,file.file.filename=@q -c 'write -P 3 0 64k' -c 'read -P 3 0 64k'",
        "io --image-opts driver=throttle,throttle-group=none,file.driver=qcow2,file.file.driver=file,file.file.filename=@q -c 'read 0 64k'",
        "img create -q -f qcow2 -o data_file=@d @e 4M", "io -c 'write -P 3 0 64k' @e", "img amend -f qcow2 -o data_file=@f @e", "img info --image-opts driver=qcow2,file.filename=@e,data-file.filename=@d", "img amend -f qcow2 -o data_file=@f @q",
        "io --image-opts driver=qcow2,file.filename=@e,data-file.filename=@d -c 'read -P 3 0 64k'");

    [Fact]
    public async Task Secrets_and_key_slots() => await SameAsync(
        "img create -q -f luks --object secret,id=s,data=abc -o key-secret=s,iter-time=10 @l 1M",
        "io --object secret,id=s,data=abc --image-opts -c 'write -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        // The same passphrase in base64, and encrypted with another secret.
        "io --object secret,id=s,format=base64,data=YWJj --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "io --object secret,id=m,format=base64,data=MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE= --object secret,id=s,keyid=m,iv=MDEyMzQ1Njc4OTAxMjM0NQ==,format=base64,data=RZrsq9e7Hen3MiIhfR/BoQ== --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "io --object secret,id=m,format=base64,data=MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE= --object secret,id=s,keyid=m,iv=MDEyMzQ1Njc4OTAxMjM0,format=base64,data=RZrsq9e7Hen3MiIhfR/BoQ== --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "io --object secret,id=s,keyid=m,iv=MDEyMzQ1Njc4OTAxMjM0NQ==,format=base64,data=RZrsq9e7Hen3MiIhfR/BoQ== --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "io --object secret,id=s,data=bad --image-opts -c 'read 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "img info --object secret,id=s @l", "img info --object secret,data=abc @l", "img info --object secret,id=s,data=abc,file=@l @l", "img info --object secret,id=s,data=abc,format=x @l",
        "img amend --object secret,id=n,data=new --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=active,new-secret=n,iter-time=10",
        "io --object secret,id=s,data=new --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "img amend --object secret,id=s,data=abc --object secret,id=n,data=new --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,old-secret=n",
        "io --object secret,id=s,data=new --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l",
        "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,old-secret=s", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,keyslot=0", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,keyslot=9",
        "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,keyslot=4", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=x", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=active",
        "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=active,keyslot=0,new-secret=s", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o new-secret=s", "img amend --object secret,id=s,data=abc --image-opts driver=luks,key-secret=s,file.filename=@l -o state=active,keyslot=12,new-secret=s",
        "img amend --object secret,id=s,data=abc --object secret,id=b,data=bad --image-opts driver=luks,key-secret=s,file.filename=@l -o state=active,new-secret=s,old-secret=b", "img amend --object secret,id=s,data=abc --object secret,id=b,data=bad --image-opts driver=luks,key-secret=s,file.filename=@l -o state=inactive,keyslot=0,old-secret=b",
        "io --object secret,id=s,data=abc --image-opts -c 'read -P 9 0 64k' driver=luks,key-secret=s,file.filename=@l");

    [Fact]
    public async Task Mistakes_in_what_runs_beside_the_commands() => await SameAsync(
        "img create -q -f qcow2 @a 4M",
        "io -c 'aio_read -P 999 0 1k' @a", "io -c 'aio_write -P x 0 1k' @a", "io -c 'aio_read 0 x' @a", "io -c 'aio_read' @a", "io -c 'aio_read -P 9 -q 0 1k' -c aio_flush @a", "io -c 'aio_read -i 0 1k' @a",
        "io -c 'read -s 9999 -P 0 0 1k' @a", "io -c 'read -l 9999 -P 0 0 1k' @a", "io -c 'read -q -s 1000 -P 0 0 1k' @a", "io -c 'read -q -s 512 -l 512 -P 0 0 1k' @a", "io -c 'quit x' @a",
        "img amend -t x -o compat=1.1 @a", "img amend -t none -o compat=1.1 @a", "img convert -O qcow2 -c -o preallocation=metadata @a @x", "img convert -c -O vmdk @a @v", "img compare @a @v");

    private static async Task SameAsync(params string[] lines)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new(inMemory: true);
        Directory.CreateDirectory(folder["q"]);
        Directory.CreateDirectory(folder["k"]);
        List<string> different = [];
        foreach (string line in lines)
        {
            string[] words = Words(line);
            (int code, string text) = await Peer.RunAsync("qemu-" + words[0], Array.ConvertAll(words[1..], w => w.Replace("@", folder["q/"], StringComparison.Ordinal)));
            string[] own = Array.ConvertAll(words[1..], w => w.Replace("@", folder["k/"], StringComparison.Ordinal));
            // A breakpoint that never stops anything would be waited for without end.
            (int ownCode, string ownText) = await (words[0] == "img" ? Peer.ImgAsync(own) : Peer.IoAsync(own)).WaitAsync(TimeSpan.FromSeconds(120));
            text = Steady(text.Replace(folder["q/"], "@", StringComparison.Ordinal), words[0] == "io");
            ownText = Steady(ownText.Replace(folder["k/"], "@", StringComparison.Ordinal), words[0] == "io");
            if (code != ownCode || text != ownText)
                different.Add($"{line}: QEMU {code}, own {ownCode}\n--- QEMU\n{text}\n--- own\n{ownText}");
        }
        Assert.True(different.Count == 0, string.Join("\n\n", different));
    }

    /// <summary>
    /// Without what time decides (how long requests took), what the file system decides (space taken), and QEMU's way of saying twice that a file
    /// cannot be opened. What io says of mistakes comes before or after the rest: its lines are sorted.
    /// </summary>
    private static string Steady(string text, bool io)
    {
        text = Ops().Replace(text, "ops");
        text = Space().Replace(text, "$1");
        text = Twice().Replace(text, "$1").TrimEnd();
        string[] lines = text.Split('\n');
        if (io)
            Array.Sort(lines, StringComparer.Ordinal);
        return string.Join('\n', lines);
    }

    [GeneratedRegex(@"\d+ ops; .*")]
    private static partial Regex Ops();

    [GeneratedRegex(@"(disk size: |""actual-size"": ).*")]
    private static partial Regex Space();

    [GeneratedRegex(@"(Could not open '[^']*': )\1")]
    private static partial Regex Twice();

    private static string[] Words(string line)
    {
        List<string> words = [];
        string[] parts = line.Split('\'');
        for (int i = 0; i < parts.Length; i++)
        {
            if (i % 2 == 1)
                words.Add(parts[i]);
            else
                words.AddRange(parts[i].Split(' ', StringSplitOptions.RemoveEmptyEntries));
        }
        return [.. words];
    }
}
