"""bench.sh soak: minutes of disk and network traffic with checks in a full Debian, and what the process holds meanwhile: memory, descriptors, threads."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import io_guest as io
import vm

ROUND = (
    "fio --name=s --filename=/dev/vdc --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw --bsrange=512-64k --size=48M --verify=crc32c --output-format=terse >/dev/null"
    " && iperf3 -c 10.0.2.2 -p {port} -t 3 >/dev/null && iperf3 -c 10.0.2.2 -p {port} -t 3 -R >/dev/null"
    " && i=0; while [ $i -lt 300 ]; do (exec 3<>/dev/tcp/10.0.2.2/{echo}; head -c 16 <&3 >/dev/null) || exit 1; i=$((i+1)); done"
)


# Seconds for which nothing happens at the end: the NAT keeps a closed connection's descriptor for up to 75 s.
QUIET = 90


def status(process):
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {
        "memory, MiB": (int(fields["RssAnon"].split()[0]) / 1024),
        "descriptors": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(fields["Threads"]),
    }


def mappings(process):
    """MiB of anonymous memory by mapping: its address, its size in MiB and its name."""
    found = {}
    key = None
    with open(f"/proc/{process}/smaps", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                key = (start, (end - start) >> 20, " ".join(words[5:]) or "unnamed")
            elif words[0] == "Anonymous:" and words[1] != "0":
                found[key] = int(words[1]) / 1024
    return found


def growth(before, after):
    """The mappings that hold a MiB more than before. One that begins at the same place is the same, though it may have grown."""
    old = {(start, name): amount for (start, _, name), amount in before.items()}
    for (start, size, name), amount in sorted(after.items(), key=lambda item: -item[1]):
        more = amount - old.get((start, name), 0)
        if abs(more) >= 1:
            yield f"{name} at {start:x} of {size} MiB: {more:+.1f} to {amount:.1f} MiB"


def serve(listener):
    """Gives each client sixteen bytes."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client:
            client.sendall(b"sixteen bytes...")


def main():
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    kvasir = vm.find_kvasir()
    files = io.debian(kvasir)
    tree, tools_disk = io.tools(os.path.dirname(files[0]))
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    server, port = io.iperf_server(tree)
    os.makedirs(vm.RESULTS, exist_ok=True)
    samples = []
    maps = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = os.path.join(folder, "data.img")
            with open(data, "wb") as file:
                file.truncate(256 << 20)
            _, command = next(io.commands(kvasir, files, tools_disk, data))
            guest = io.Guest("kvasir", command, os.path.join(vm.RESULTS, "soak.log"))
            log = open(os.path.join(vm.RESULTS, "soak-rounds.log"), "w", encoding="utf-8")
            try:
                guest.login()
                rounds = 0
                end = None
                while end is None or time.monotonic() < end:
                    guest.command(f"( {ROUND.format(port=port, echo=listener.getsockname()[1])} )", 600)
                    rounds += 1
                    samples.append(status(guest.console.process))
                    maps.append(mappings(guest.console.process))
                    print(rounds, samples[-1], file=log, flush=True)
                    # The first round fills caches and pools.
                    end = end or time.monotonic() + 60 * minutes
                guest.command("! dmesg --level=err,crit,alert,emerg | grep .")
                time.sleep(QUIET)
                quiet = status(guest.console.process)
                guest.stop()
            finally:
                guest.console.close()
                log.close()
    finally:
        server.terminate()
        server.wait()
        listener.close()
    print(f"{minutes:g} minutes, {rounds} rounds of verified disk traffic, iperf3 both ways and 300 connections")
    middle = samples[len(samples) // 2]
    for what, first in samples[0].items():
        print(f"{what}: {first:g} after the first round, {middle[what]:g} in the middle, {samples[-1][what]:g} at the end, at most {max(sample[what] for sample in samples):g}; {quiet[what]:g} after {QUIET} s without traffic")
    for name, first, last in (("first", 0, len(maps) // 2), ("second", len(maps) // 2, -1)):
        print(f"what grew in the {name} half:")
        for line in growth(maps[first], maps[last]):
            print(f"  {line}")


if __name__ == "__main__":
    try:
        main()
    except (vm.BenchError, subprocess.SubprocessError) as error:
        raise SystemExit(f"bench: {error}") from None
