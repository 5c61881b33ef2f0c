"""bench.sh io: a full Debian under Kvasir and under QEMU's software CPU, the same image, kernel and devices in turn: its way to the login prompt, fio on a virtio disk,
iperf3 through the user network."""

import glob
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import vm

LOGIN_LIMIT = 600
COMMAND_LIMIT = 300
SECONDS = 5
# As in vm.LINUX_APPEND: a busy host must not end the guest.
APPEND = "root=/dev/vda rw console=ttyS0 quiet no_timer_check"
PACKAGES = ["fio", "iperf3"]
FIO = [
    ("sequential reads, 128 KiB", "read", "128k"),
    ("sequential writes, 128 KiB", "write", "128k"),
    ("random reads, 4 KiB", "randread", "4k"),
    ("random writes, 4 KiB", "randwrite", "4k"),
]


def run(*command, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        raise vm.BenchError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stdout[-1500:]}")
    return done.stdout


def cache():
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kvasir")


def debian(kvasir):
    """Kernel, initial file system and disk of the guest debian, built where they are not there."""
    found = glob.glob(os.path.join(cache(), "guests", "debian-12-*", "disk.qcow2"))
    if not found:
        run(kvasir, "image", "build", "debian")
        found = glob.glob(os.path.join(cache(), "guests", "debian-12-*", "disk.qcow2"))
    folder = os.path.dirname(max(found, key=os.path.getmtime))
    return os.path.join(folder, "vmlinuz"), os.path.join(folder, "initrd"), os.path.join(folder, "disk.qcow2")


def tools(guest):
    """A tree with the programs and all libraries that a guest (the folder of its files) has not, and the same as a disk."""
    folder = os.path.join(cache(), "bench", "io")
    os.makedirs(folder, exist_ok=True)
    tree, disk = os.path.join(folder, "tree"), os.path.join(folder, "tools.img")
    if os.path.exists(disk):
        return tree, disk
    with open(os.path.join(guest, "packages.txt"), encoding="utf-8") as file:
        present = {line.split()[0] for line in file if line.strip()}
    with tempfile.TemporaryDirectory() as temporary:
        status = os.path.join(temporary, "status")
        open(status, "w").close()
        listed = run("apt-get", "-o", f"Dir::State::status={status}", "-o", "APT::Install-Recommends=false", "-y", "-s", "install", *PACKAGES)
        names = [line.split()[1] for line in listed.split("\n") if line.startswith("Inst ")]
        wanted = [name for name in names if name not in present]
        run("apt-get", "-o", "APT::Sandbox::User=root", "download", *wanted, cwd=temporary)
        shutil.rmtree(tree, ignore_errors=True)
        os.makedirs(tree)
        for package in glob.glob(os.path.join(temporary, "*.deb")):
            run("dpkg", "-x", package, tree)
    shutil.rmtree(os.path.join(tree, "usr/share"), ignore_errors=True)
    run("mke2fs", "-q", "-t", "ext4", "-F", "-L", "tools", "-d", tree, disk + ".new", "600M", env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
    os.rename(disk + ".new", disk)
    return tree, disk


def iperf_server(tree):
    """A server on this host's loopback, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(os.path.join(tree, folder) for folder in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"))}
    command = [os.path.join(tree, "usr/bin/iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment), port


def commands(kvasir, files, tools_disk, data):
    kernel, initrd, disk = files
    yield "kvasir", [
        kvasir, "run", "--accel", "soft", "--memory", "1G", "--kernel", kernel, "--initrd", initrd, "--append", APPEND, "--disk", f"{disk},snapshot",
        "--disk", f"{tools_disk},format=raw,readonly", "--disk", f"{data},format=raw", "--net", "user,loopback"]
    if vm.QEMU:
        def drive(name, file, options):
            return ["-drive", f"file={file},if=none,id={name},{options}", "-device", f"virtio-blk-pci,drive={name}"]

        yield "qemu tcg", vm.qemu_linux(
            kernel, initrd, *drive("a", disk, "format=qcow2,snapshot=on"), *drive("b", tools_disk, "format=raw,readonly=on"), *drive("c", data, "format=raw"),
            "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", memory=1024, append=APPEND)


class Guest:
    """A Debian whose console is driven as a person would: the prompts end no line, so they are waited for as they come."""

    def __init__(self, name, command, log):
        self.name = name
        self.console = vm.Console(name, command, log)

    def login(self):
        begun = self.console.begun
        self.wait(" login: ", LOGIN_LIMIT)
        seconds = time.perf_counter() - begun
        self.console.type("debian")
        self.wait("Password: ", COMMAND_LIMIT)
        self.console.type("debian")
        self.wait("$ ", COMMAND_LIMIT)
        self.console.type("exec sudo env PS1= PATH=/t/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin LD_LIBRARY_PATH=/t/usr/lib/x86_64-linux-gnu:/t/lib/x86_64-linux-gnu:/t/usr/lib/x86_64-linux-gnu/ceph bash --norc --noediting -c 'stty -echo; exec bash --norc --noediting'")
        self.command("mkdir -p /t; mount -o ro /dev/vdb /t; cat /proc/sys/kernel/osrelease")
        return seconds

    def wait(self, text, limit):
        self.console.wait(text.encode(), limit)

    def command(self, line, limit=COMMAND_LIMIT):
        """What a command prints; its exit code must be 0."""
        self.console.type(f"echo '@@'BEGIN; {line}; r=$?; echo; echo '@@'END $r")
        self.console.expect("@@BEGIN", limit)
        lines = []
        deadline = time.perf_counter() + limit
        while True:
            text = self.console.line(deadline)
            if text.startswith("@@END"):
                break
            lines.append(text)
        if text != "@@END 0":
            raise vm.BenchError(f"{self.name}: {line!r} ended with {text[5:]}:\n" + "\n".join(lines[-20:]))
        return "\n".join(lines)

    def stop(self):
        self.console.type("systemctl poweroff")
        self.console.end(COMMAND_LIMIT)


def number(text):
    start = text.find("{")
    if start < 0:
        raise vm.BenchError(f"no result in:\n{text[-1000:]}")
    return json.JSONDecoder().raw_decode(text[start:])[0]


def measure(guest, server, seconds):
    results = {}
    for what, mode, block in FIO:
        out = guest.command(
            f"fio --name=x --filename=/dev/vdc --direct=1 --ioengine=libaio --iodepth=16 --rw={mode} --bs={block} --time_based --runtime={seconds} --output-format=json", COMMAND_LIMIT + seconds)
        job = number(out)["jobs"][0]
        side = job["read" if "read" in mode else "write"]
        results[what] = side["bw"] / 1024 if block == "128k" else side["iops"]
    for what, mode in (("network, guest to host", ""), ("network, host to guest", "-R")):
        out = guest.command(f"iperf3 -c 10.0.2.2 -p {server} -t {seconds} -J {mode}", COMMAND_LIMIT + seconds)
        results[what] = number(out)["end"]["sum_received"]["bits_per_second"] / 1e6
    # What is written is read back and compared.
    guest.command("fio --name=v --filename=/dev/vdc --direct=1 --ioengine=libaio --iodepth=8 --rw=randwrite --bs=8k --size=32M --verify=crc32c --do_verify=1 --output-format=terse >/dev/null", 600)
    return results


def unit(what):
    return "s" if what.startswith("to the login") else "Mbit/s" if what.startswith("network") else "MiB/s" if "128" in what else "requests/s"


def report(samples):
    names = list(samples)
    rows = []
    for what in samples[names[0]][0]:
        values = {name: statistics.median(sample[what] for sample in samples[name]) for name in names if samples[name]}
        rows.append({"what": what, "unit": unit(what), **values})
        line = f"{what} ({unit(what)}): " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if len(values) == 2:
            ours, theirs = values["kvasir"], values["qemu tcg"]
            line += f"; {theirs / ours if unit(what) == 's' else ours / theirs:.2f} times as fast"
        print(line)
    with open(os.path.join(vm.RESULTS, "io.json"), "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)


def main():
    try:
        runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1
        seconds = int(sys.argv[2]) if len(sys.argv) > 2 else SECONDS
    except ValueError:
        raise SystemExit("bench: usage: bench.sh io guest [RUNS] [SECONDS]") from None
    kvasir = vm.find_kvasir()
    files = debian(kvasir)
    os.makedirs(vm.RESULTS, exist_ok=True)
    tree, tools_disk = tools(os.path.dirname(files[0]))
    server, port = iperf_server(tree)
    samples = {}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            data = os.path.join(temporary, "data.img")
            for _ in range(runs):
                for name, command in commands(kvasir, files, tools_disk, data):
                    with open(data, "wb") as file:
                        file.write(os.urandom(1 << 20) * 256)
                    guest = Guest(name, command, os.path.join(vm.RESULTS, f"io-{name.split()[0]}.log"))
                    try:
                        login = guest.login()
                        samples.setdefault(name, []).append({"to the login prompt": login, **measure(guest, port, seconds)})
                        guest.stop()
                    finally:
                        guest.console.close()
    finally:
        server.terminate()
        server.wait()
    report(samples)


if __name__ == "__main__":
    try:
        main()
    except vm.BenchError as error:
        raise SystemExit(f"bench: {error}") from None
