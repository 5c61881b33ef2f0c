"""bench.sh cpu: the same programs and files natively, in a VM of Kvasir and in a VM of QEMU's software CPU, load by load in turn, in one table."""

import argparse
import json
import math
import os
import statistics
import sys
import time

import guest
import vm

CLASSES = {
    "compute": ["mix", "quicksort", "sha256-c", "matrix", "hash-cache", "hash-14M", "fib", "bytes", "calls"],
    "programs": ["gzip", "sha256sum", "7z", "python", "sysbench", "matrixprod", "aes-128-cbc", "sha-256", "rsa-2048", "sqlite"],
    "kernel": ["fork+exec", "read-write-1", "dd-zero-null", "dd-pipe", "find", "getppid", "page-faults", "switches", "fork", "signals"],
    "parallel": ["parallel-1", "parallel-2"],
    "boot": ["boot"],
}
TITLES = {
    "compute": "compute kernels in user space", "programs": "real programs", "kernel": "kernel-heavy", "parallel": "two processors", "boot": "default guest to its prompt",
}
# These five have figures from before there were more.
FIRST_KERNEL = ["fork+exec", "read-write-1", "dd-zero-null", "dd-pipe", "find"]
PROMPT = "kvasir:/root# "
BOOT_LIMIT = 300


class Native:
    """The loads in a chroot of the guest's files, on one processor (or two), with a tmpfs at /tmp as in the guest."""

    name = "native"

    def __init__(self, built, processors):
        # A user namespace gives an ordinary user the right to mount and chroot.
        script = (
            'mount -t tmpfs tmp "$0/tmp" && mount --rbind /dev "$0/dev" && mount --rbind /proc "$0/proc" && mount --rbind /sys "$0/sys" && '
            'exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C chroot "$0" /bin/sh /bench/agent.sh'
        )
        allowed = sorted(os.sched_getaffinity(0))[:processors]
        self.console = vm.Console(
            "native", ["taskset", "-c", ",".join(map(str, allowed)), "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, built.root],
            os.path.join(vm.RESULTS, "cpu-native.log"))
        self.console.expect("@READY", 30)
        self.boot_seconds = None

    def processor_seconds(self):
        return None

    def close(self):
        self.console.close()


class Machine:
    """The loads in a VM."""

    def __init__(self, name, command):
        self.name = name
        self.console = vm.Console(name, command, os.path.join(vm.RESULTS, f"cpu-{name.replace(' ', '-')}.log"))
        try:
            self.console.expect("@READY", BOOT_LIMIT)
        except vm.BenchError:
            self.console.close()
            raise
        self.boot_seconds = time.perf_counter() - self.console.begun

    def processor_seconds(self):
        return self.console.processor_seconds()

    def close(self):
        self.console.close()


def run_load(system, name, limit):
    """Runs a load once: its own clock's seconds, processor seconds (the host's, of the whole VM), checksum."""
    console = system.console
    deadline = time.perf_counter() + limit
    console.type(name)
    result = {"seconds": None, "processor_seconds": None, "sum": None}
    host = [0.0, 0.0]
    rate = None
    while True:
        words = console.line(deadline).split()
        if len(words) < 2 or words[1] != name:
            continue
        match words[0]:
            case "@BEGIN":
                host[0] = time.perf_counter()
                before = system.processor_seconds()
            case "@END":
                after = system.processor_seconds()
                host[1] = time.perf_counter()
                result["seconds"] = float(words[2])
                result["processor_seconds"] = float(words[3]) if after is None else after - before
                result["host_seconds"] = host[1] - host[0]
            case "@RATE":
                rate = float(words[2]), float(words[3])
            case "@SUM":
                result["sum"] = words[2]
            case "@DONE":
                if words[2] != "0" or result["sum"] is None:
                    raise vm.BenchError(console.failure(f"failed at {name} (code {words[2]})"))
                if rate:
                    result["seconds"] = rate[0]
                    result["processor_seconds"] *= rate[1]
                return result


class Bench:
    def __init__(self, options):
        self.options = options
        self.kvasir = vm.find_kvasir()
        self.kernel, self.default_initrd = vm.default_guest(self.kvasir)
        self.built = guest.build()
        self.systems = {}
        self.results = {}
        self.boots = {}
        self.faults = []
        self.kvasir_options = ["--accel", "soft"] + (["--engine", options.engine] if options.engine else []) + options.kvasir_option

    def names(self):
        found = [] if self.options.skip_native else ["native"]
        found.append("kvasir")
        if vm.QEMU and not self.options.skip_qemu:
            found.append("qemu")
        return found

    def start(self, name, processors):
        append = "console=ttyS0 quiet panic=-1"
        if name == "native":
            return Native(self.built, processors)
        if name == "kvasir":
            command = vm.kvasir_linux(self.kvasir, self.kernel, self.built.initrd, *self.kvasir_options, memory=self.options.memory, cpus=processors, append=append)
        else:
            command = vm.qemu_linux(self.kernel, self.built.initrd, memory=self.options.memory, cpus=processors, append=append)
        return Machine(name, command)

    def system(self, name, processors):
        """A system that is ready, started where it is not: a VM that died over one load comes back for the next."""
        if (name, processors) not in self.systems:
            started = self.start(name, processors)
            self.systems[name, processors] = started
            if started.boot_seconds is not None:
                self.boots.setdefault(name, []).append(started.boot_seconds)
        return self.systems[name, processors]

    def drop(self, name, processors):
        self.systems.pop((name, processors)).close()

    def close(self):
        for system in self.systems.values():
            system.close()
        self.systems.clear()

    def measure(self, load):
        """A load on every system, in turn, so that a busy moment of the machine hits each of them."""
        processors = 2 if load in CLASSES["parallel"] else 1
        for _ in range(self.options.runs):
            for name in self.names():
                if self.results.get((load, name), [None])[-1:] == ["failed"]:
                    continue
                kept = self.results.setdefault((load, name), [])
                try:
                    kept.append(run_load(self.system(name, processors), load, self.options.limit))
                except vm.BenchError as error:
                    self.faults.append(f"{load}: {error}")
                    kept.append("failed")
                    if (name, processors) in self.systems:
                        self.drop(name, processors)
        sums = {run["sum"] for name in self.names() for run in self.results[load, name] if run != "failed"}
        if len(sums) > 1:
            each = "; ".join(f"{name} {' '.join(sorted({run['sum'] for run in self.results[load, name] if run != 'failed'}))}" for name in self.names())
            self.faults.append(f"{load}: WRONG RESULT: the checksums differ: {each}")

    def boot(self):
        commands = {"kvasir": vm.kvasir_linux(self.kvasir, self.kernel, self.default_initrd, *self.kvasir_options)}
        if vm.QEMU and not self.options.skip_qemu:
            commands["qemu"] = vm.qemu_linux(self.kernel, self.default_initrd)
        for _ in range(self.options.runs):
            for name, command in commands.items():
                console = vm.Console(name, command)
                try:
                    # The prompt ends no line; the banner before it does, and comes with it.
                    console.expect("'exit' or 'poweroff' ends it.", BOOT_LIMIT)
                    seconds = time.perf_counter() - console.begun
                    self.results.setdefault(("boot", name), []).append({"seconds": seconds, "processor_seconds": console.processor_seconds(), "sum": ""})
                except vm.BenchError as error:
                    self.faults.append(f"boot: {error}")
                finally:
                    console.close()

    def runs_of(self, load, name):
        return [run for run in self.results.get((load, name), []) if run != "failed"]

    def ratios(self, load, name, against, what):
        """Ratios of the runs that were made in the same turn; each against native's median where there are more of one."""
        mine, base = self.runs_of(load, name), self.runs_of(load, against)
        if not mine or not base:
            return []
        if len(mine) == len(base):
            return [a[what] / max(b[what], 1e-9) for a, b in zip(mine, base)]
        middle = statistics.median(b[what] for b in base)
        return [a[what] / middle for a in mine]


def geometric(values):
    return math.exp(sum(math.log(value) for value in values) / len(values))


def spread(values, digits=1):
    if not values:
        return "-"
    ordered = sorted(values)
    middle = statistics.median(ordered)
    return f"{middle:.{digits}f}" if len(ordered) == 1 else f"{middle:.{digits}f} ({ordered[0]:.{digits}f}-{ordered[-1]:.{digits}f})"


def table(bench, loads, out):
    names = bench.names()
    machines = [name for name in names if name != "native"]
    native = "native" in names
    head = f"{'':14}" + (f"{'native s':>10}" if native else "")
    for name in machines:
        head += f"{name + ' s':>10}" + (f"{'x wall':>18}{'x processor':>20}" if native else f"{'processor s':>12}")
    for kind, members in CLASSES.items():
        chosen = [load for load in members if load in loads]
        if not chosen or kind in ("parallel", "boot"):
            continue
        print(f"\n{TITLES[kind]}\n{head}", file=out)
        for load in chosen:
            text = f"{load:14}"
            for name in names:
                runs = bench.runs_of(load, name)
                text += f"{statistics.median(run['seconds'] for run in runs):10.3f}" if runs else f"{'failed':>10}"
                if name in machines and native:
                    text += f"{spread(bench.ratios(load, name, 'native', 'seconds')):>18}{spread(bench.ratios(load, name, 'native', 'processor_seconds')):>20}"
                elif name in machines:
                    text += f"{statistics.median(run['processor_seconds'] for run in runs):12.3f}" if runs else f"{'-':>12}"
            print(text, file=out)
        if native:
            means(bench, f"geometric mean of {len(chosen)}", chosen, machines, out)
            if kind == "kernel" and len(chosen) > len(FIRST_KERNEL) and all(load in chosen for load in FIRST_KERNEL):
                means(bench, "of the first five", FIRST_KERNEL, machines, out)


def means(bench, title, loads, machines, out):
    text = f"{title:24}"
    for name in machines:
        columns = []
        for what in ("seconds", "processor_seconds"):
            each = [bench.ratios(load, name, "native", what) for load in loads]
            measured = [statistics.median(one) for one in each if one]
            columns.append((f"{geometric(measured):.2f}" if measured else "-") + ("" if len(measured) == len(loads) else f" (of {len(measured)})"))
        text += f"{'':10}{columns[0]:>18}{columns[1]:>20}"
    print(text, file=out)


def parallel_table(bench, out):
    print(f"\n{TITLES['parallel']}: two threads do twice the work of one; how many times one processor's speed that is", file=out)
    for name in bench.names():
        one, two = bench.runs_of("parallel-1", name), bench.runs_of("parallel-2", name)
        if one and two:
            gains = [2 * a["seconds"] / b["seconds"] for a, b in zip(one, two)]
            print(f"{name:14}one {statistics.median(run['seconds'] for run in one):.3f} s, two {statistics.median(run['seconds'] for run in two):.3f} s, gain {spread(gains, 2)}",
                  file=out)


def boot_table(bench, loads, out):
    if "boot" in loads:
        print(f"\n{TITLES['boot']}, s: wall, processor", file=out)
        for name in bench.names():
            runs = bench.runs_of("boot", name)
            if runs:
                print(f"{name:14}{spread([run['seconds'] for run in runs], 2):>22}{spread([run['processor_seconds'] for run in runs], 2):>22}", file=out)
    for name, seconds in bench.boots.items():
        print(f"{name}: this guest (with its 90 MiB of files in memory) was ready after {', '.join(f'{value:.1f}' for value in seconds)} s", file=out)


def parse():
    parser = argparse.ArgumentParser(prog="bench.sh cpu", description="Loads natively, under Kvasir and under QEMU's software CPU.")
    parser.add_argument("--only", action="append", default=[], metavar="CLASS|NAME", help=f"these loads only (classes: {', '.join(CLASSES)}; names as in the table)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="how often (default 3)")
    parser.add_argument("--skip-qemu", action="store_true", help="measure no QEMU")
    parser.add_argument("--skip-native", action="store_true", help="measure nothing natively, so print no ratios")
    parser.add_argument("--engine", metavar="E", help="kvasir run --engine E")
    parser.add_argument("--kvasir-option", action="append", default=[], metavar="O", help="a further option of kvasir run (repeat; use --kvasir-option=--log)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="of each VM (default 1024)")
    parser.add_argument("--limit", type=float, default=120, metavar="S", help="seconds after which a load has failed (default 120)")
    parser.add_argument("--keep", action="store_true", help="leave the VMs running afterwards, until Enter is pressed: for perf")
    parser.add_argument("--list", action="store_true", help="name the loads")
    options = parser.parse_args()
    wanted = [word for words in options.only for word in words.split(",")] or list(CLASSES)
    loads = []
    for word in wanted:
        known = CLASSES.get(word, [word] if any(word in members for members in CLASSES.values()) else None)
        if known is None:
            parser.error(f"no class or load is called '{word}'")
        loads += [load for load in known if load not in loads]
    if options.runs < 1:
        parser.error("--runs takes a number from 1")
    if options.list:
        for kind, members in CLASSES.items():
            print(f"{kind}: {' '.join(members)}")
        raise SystemExit(0)
    return options, loads


def main():
    options, loads = parse()
    os.makedirs(vm.RESULTS, exist_ok=True)
    begun = time.perf_counter()
    bench = Bench(options)
    try:
        for load in loads:
            print(f"bench: {load}", file=sys.stderr, flush=True)
            if load == "boot":
                bench.boot()
            else:
                bench.measure(load)
        print(f"median (least-most) of {options.runs} runs, in turn; 'x wall' by the guest's clock, 'x processor' by the host's processor time of the whole process; "
              f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors, {time.perf_counter() - begun:.0f} s")
        table(bench, loads, sys.stdout)
        if any(load in loads for load in CLASSES["parallel"]):
            parallel_table(bench, sys.stdout)
        print()
        boot_table(bench, loads, sys.stdout)
        sys.stdout.flush()
        with open(os.path.join(vm.RESULTS, "cpu.json"), "w", encoding="ascii") as file:
            json.dump({
                "benchmark": "cpu", "runs": options.runs, "kvasir_options": bench.kvasir_options, "load_average": os.getloadavg(), "processors": os.cpu_count(),
                "classes": CLASSES, "boots": bench.boots, "faults": bench.faults,
                "results": {load: {name: bench.results.get((load, name), []) for name in bench.names()} for load in loads},
            }, file, indent=1)
            file.write("\n")
        if options.keep:
            for (name, processors), system in bench.systems.items():
                print(f"{name}, {processors} processor(s): process {system.console.process}")
            input("Enter ends them. ")
    finally:
        bench.close()
    for fault in bench.faults:
        print(f"bench: {fault}", file=sys.stderr)
    if bench.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except (vm.BenchError, guest.GuestError) as error:
        raise SystemExit(f"bench: {error}") from None
