"""bench.sh events: what single events cost in a VM: a TLB miss with its page walk, a page fault to its handler and back, an access to a port. Kvasir and QEMU in turn."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import vm

SOURCE = os.path.join(vm.ROOT, "bench", "cpu", "events.asm")
LIMIT = 120
# What the source counts with.
ACCESSES, FAULTS, PORTS = 30_000_000, 2_000_000, 5_000_000
PARTS = ("h", "m", "f", "p", "e")


def commands(kvasir, image):
    device = "isa-debug-exit,iobase=0xf4,iosize=0x04"
    yield "kvasir", [kvasir, "run", "--accel", "soft", "--machine", "q35", "--memory", "256M", "--kernel", image, "--device", device]
    if vm.QEMU:
        yield "qemu tcg", [vm.QEMU, "-accel", "tcg", "-cpu", "max", "-machine", "q35", "-m", "256", "-display", "none", "-monitor", "none", "-no-user-config", "-nodefaults",
                           "-serial", "stdio", "-kernel", image, "-device", device]


def measure(command):
    """Nanoseconds of each event."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    clock = {}
    end = time.monotonic() + LIMIT
    try:
        while "e" not in clock:
            line = process.stdout.readline()
            if not line or time.monotonic() > end:
                raise vm.BenchError(f"ended before its last line: {' '.join(command)}")
            if line.strip().decode("latin1") in PARTS:
                clock[line.strip().decode("latin1")] = time.perf_counter()
    finally:
        process.kill()
        process.wait()
    hit = (clock["m"] - clock["h"]) / ACCESSES
    return {
        "tlb_hit": hit * 1e9,
        "tlb_miss": ((clock["f"] - clock["m"]) / ACCESSES - hit) * 1e9,
        "page_fault": (clock["p"] - clock["f"]) / FAULTS * 1e9,
        "port_write": (clock["e"] - clock["p"]) / PORTS * 1e9,
    }


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    if not shutil.which("nasm"):
        raise vm.BenchError("nasm is missing: install the package nasm")
    os.makedirs(vm.RESULTS, exist_ok=True)
    kvasir = vm.find_kvasir()
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "events.bin")
        subprocess.run(["nasm", "-f", "bin", "-o", image, SOURCE], check=True)
        results = {name: [] for name, _ in commands(kvasir, image)}
        for _ in range(runs):
            for name, command in commands(kvasir, image):
                results[name].append(measure(command))
    print(f"events, ns: median (least-most) of {runs} runs, in turn; load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    columns = ("tlb_hit", "tlb_miss", "page_fault", "port_write")
    print(f"{'':12}" + "".join(f"{column.replace('_', ' '):>26}" for column in columns))
    for name, found in results.items():
        cells = []
        for column in columns:
            values = sorted(result[column] for result in found)
            cells.append(f"{statistics.median(values):.1f} ({values[0]:.1f}-{values[-1]:.1f})")
        print(f"{name:12}" + "".join(f"{cell:>26}" for cell in cells))
    with open(os.path.join(vm.RESULTS, "events.json"), "w", encoding="ascii") as file:
        json.dump({"benchmark": "events", "load_average": os.getloadavg(), "results": results}, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    try:
        main()
    except vm.BenchError as error:
        raise SystemExit(f"bench: {error}") from None
