"""bench.sh boot, life, mips, idle: runs VMs under Kvasir and QEMU in turn, and prints medians and spreads of what it saw."""

import json
import os
import pty
import resource
import select
import signal
import statistics
import sys
import tempfile
import time

import vm

PROMPT = b"kvasir:/root# "
TIME_LIMIT = 120

# 16-bit code at the ROM's start, entered from the reset vector; out 0xf4 leaves with (value << 1) | 1.
LEAVE = bytes([0xB0, 0x15, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD])
# mov ecx, COUNT; loop: add eax, ecx; xor ebx, eax; lea edx, [ebx + ecx]; rol eax, 3; dec ecx; jnz loop; then leaves.
LOOP_COUNT = 100_000_000
LOOP_LENGTH = 6
LOOP = (
    bytes([0x66, 0xB9]) + LOOP_COUNT.to_bytes(4, "little")
    + bytes([0x66, 0x01, 0xC8, 0x66, 0x31, 0xC3, 0x66, 0x67, 0x8D, 0x14, 0x0B, 0x66, 0xC1, 0xC0, 0x03, 0x66, 0x49, 0x75, 0xEE])
    + LEAVE
)
EXIT_CODE = 0x15 << 1 | 1


def rom(code):
    image = bytearray(b"\xf4" * 65536)
    image[0 : len(code)] = code
    image[0xFFF0:0xFFF5] = bytes([0xEA, 0x00, 0x00, 0x00, 0xF0])
    return bytes(image)


def measure(command, until=None, hold=0.0):
    """Runs a command on a terminal of its own.

    Returns seconds (to the text `until`, or to the end), peak resident KiB, processor seconds during `hold` and in all, and the exit code."""
    begun = time.perf_counter()
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    seen = b""
    seconds = None
    held = None
    deadline = begun + TIME_LIMIT
    while time.perf_counter() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if not ready:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        seen = (seen + data)[-65536:]
        if until is not None and until in seen:
            seconds = time.perf_counter() - begun
            if hold > 0:
                time.sleep(3)
                before = vm.processor_seconds(process)
                time.sleep(hold)
                held = vm.processor_seconds(process) - before
            os.kill(process, signal.SIGKILL)
            break
    else:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    os.close(terminal)
    if until is None:
        seconds = time.perf_counter() - begun
    elif seconds is None:
        code = os.waitstatus_to_exitcode(status)
        ended = f"after {time.perf_counter() - begun:.0f} s (code {code})"
        raise vm.BenchError(f"{' '.join(command)}\nended {ended} without printing {until!r}; its last words:\n{seen[-2000:].decode('latin1')}")
    return seconds, usage.ru_maxrss, held, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)


def linux_commands(kvasir):
    kernel, initrd = vm.default_guest(kvasir)
    yield "kvasir q35", vm.kvasir_linux(kvasir, kernel, initrd)
    if vm.QEMU:
        for machine in ("pc", "q35"):
            yield f"qemu tcg {machine}", vm.qemu_linux(kernel, initrd, machine=machine)


def rom_commands(kvasir, path, accelerators=("soft",)):
    exit_device = "isa-debug-exit,iobase=0xf4,iosize=0x04"
    for accelerator in accelerators:
        for machine in ("microvm", "q35"):
            yield f"kvasir {accelerator} {machine}", [
                kvasir, "run", "--accel", accelerator, "--machine", machine, "--memory", "512M", "--firmware", path, "--serial", "none", "--device", exit_device]
        if not vm.QEMU:
            continue
        # Its own processor models ask some KVMs for registers that they do not have.
        peer, cpu = ("kvm", "qemu64") if accelerator == "kvm" else ("tcg", "max")
        for machine in ("microvm", "pc"):
            yield f"qemu {peer} {machine}", [
                vm.QEMU, "-accel", peer, "-cpu", cpu, "-machine", machine, "-m", "512", "-display", "none", "-no-user-config", "-nodefaults",
                "-serial", "none", "-bios", path, "-device", exit_device,
            ]


def collect(commands, runs, faults, until=None, hold=0.0, expect=None):
    """Runs all commands in turn, `runs` times, so that a busy moment of the machine hits each of them. What gives no result goes to `faults`."""
    commands = list(commands)
    results = {name: [] for name, _ in commands}
    for _ in range(runs):
        for name, command in commands:
            try:
                seconds, peak, held, usage, code = measure(command, until, hold)
                if expect is not None and code != expect:
                    raise vm.BenchError(f"ended with code {code}, not {expect}: {' '.join(command)}")
            except vm.BenchError as error:
                faults.append(f"{name}: {error}")
                continue
            results[name].append({"seconds": seconds, "peak_kib": peak, "processor_seconds": held, "total": usage})
    return results


def row(values, scale, digits):
    ordered = sorted(value * scale for value in values)
    if not ordered:
        return "no result"
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def main():
    what = sys.argv[1]
    try:
        runs = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    except ValueError:
        runs = 0
    if runs < 1 or len(sys.argv) > 3:
        raise SystemExit(f"bench: usage: bench.sh {what} [N], N a number of runs from 1")
    kvasir = vm.find_kvasir()
    faults = []
    os.makedirs(vm.RESULTS, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rom.bin")
        if what in ("life", "mips"):
            with open(path, "wb") as file:
                file.write(rom(LEAVE if what == "life" else LOOP))
        if what == "boot":
            results = collect(linux_commands(kvasir), runs, faults, until=PROMPT)
            columns = [("to prompt, s", lambda r: row([x["seconds"] for x in r], 1, 2)), ("processor time, s", lambda r: row([x["total"] for x in r], 1, 2))]
        elif what == "life":
            accelerators = ("soft", "kvm") if os.access("/dev/kvm", os.R_OK | os.W_OK) else ("soft",)
            results = collect(rom_commands(kvasir, path, accelerators), runs, faults, expect=EXIT_CODE)
            columns = [
                ("whole life, ms", lambda r: row([x["seconds"] for x in r], 1000, 1)),
                ("peak memory, MiB", lambda r: row([x["peak_kib"] for x in r], 1 / 1024, 1)),
            ]
        elif what == "mips":
            results = collect(rom_commands(kvasir, path), runs, faults, expect=EXIT_CODE)
            total = LOOP_COUNT * LOOP_LENGTH / 1e6
            columns = [("million instructions/s", lambda r: row([total / x["seconds"] for x in r], 1, 0))]
        else:
            hold = 10.0
            results = collect(linux_commands(kvasir), runs, faults, until=PROMPT, hold=hold)
            columns = [("processor time, % of one", lambda r: row([x["processor_seconds"] / hold for x in r], 100, 2))]
    print(f"{what}: median (least to most) of {runs} runs, in turn; load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print(f"{'':20}" + "".join(f"{title:>34}" for title, _ in columns))
    for name, values in results.items():
        print(f"{name:20}" + "".join(f"{show(values):>34}" for _, show in columns))
    if not vm.QEMU:
        print("qemu-system-x86_64 is not there (package qemu-system-x86): nothing to compare with")
    with open(os.path.join(vm.RESULTS, f"{what}.json"), "w", encoding="ascii") as file:
        json.dump({"benchmark": what, "runs": runs, "load_average": os.getloadavg(), "processors": os.cpu_count(), "faults": faults, "results": results}, file, indent=2)
        file.write("\n")
    for fault in faults:
        print(f"bench: {fault}", file=sys.stderr)
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        main()
    except vm.BenchError as error:
        raise SystemExit(f"bench: {error}") from None
