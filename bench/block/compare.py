"""Runs the same command lines through kvasir img and qemu-img and prints times, their ratio and peak memory."""
import json
import os
import random
import subprocess
import sys
import tempfile
import time

ROUNDS = int(os.environ.get("BLOCK_ROUNDS", "5"))
MIB = int(os.environ.get("BLOCK_MIB", "1024"))
FOLDER = os.environ.get("BLOCK_FOLDER", "artifacts/bench/block")
SECRET = ["--object", "secret,id=s,data=mellon"]


def measure(command):
    """Seconds, seconds of processor and peak KiB of a command."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # The kernel's own maximum begins with this interpreter's size, so the program's is looked at while it runs.
    peak = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        try:
            with open(f"/proc/{process.pid}/status") as file:
                peak = max([peak] + [int(line.split()[1]) for line in file if line.startswith("VmHWM:")])
        except OSError:
            pass
        time.sleep(0.004)
    spent = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {process.stderr.read().decode()}")
    process.stderr.close()
    return spent, usage.ru_utime + usage.ru_stime, peak


def drop_cache(path):
    """Leaves a file's data on disk only."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_raw(path):
    """A disk such as file systems leave: a third random, a third compressible, a third never written."""
    random.seed(1)
    words = [bytes(random.choices(range(97, 123), k=random.randint(2, 9))) for _ in range(2000)]
    with open(path, "wb") as file:
        file.truncate(MIB << 20)
        for at in range(MIB):
            kind = at % 3
            if kind == 2:
                continue
            file.seek(at << 20)
            if kind == 0:
                file.write(random.randbytes(1 << 20))
            else:
                file.write(b" ".join(random.choices(words, k=1 << 18))[: 1 << 20])


def table(rows):
    print("seconds; seconds of processor (which other programs on the machine disturb less); peak memory in MiB")
    print(f"{'case':42} {'kvasir':>8} {'qemu-img':>8} {'faster':>7}  {'cpu':>7} {'cpu':>7} {'less':>6}  {'MiB':>4} {'MiB':>4}")
    for name, own, theirs in rows:
        print(f"{name:42} {own[0]:8.3f} {theirs[0]:8.3f} {theirs[0] / own[0]:6.2f}x  {own[1]:7.3f} {theirs[1]:7.3f} {theirs[1] / own[1]:5.2f}x  {own[2] / 1024:4.0f} {theirs[2] / 1024:4.0f}")


def main():
    kvasir = os.environ.get("KVASIR") or (os.path.realpath("out/current/kvasir") if os.path.exists("out/current/kvasir") else sys.argv[1])
    words = sys.argv[2:]
    os.makedirs(FOLDER, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        at = lambda name: os.path.join(folder, name)

        def case(name, arguments, before=None, result=None, rounds=ROUNDS):
            if words and not any(word in name for word in words):
                return
            # What the case before wrote goes to the disk now, not beside this one.
            os.sync()
            best = [(1e9, 1e9, 0), (1e9, 1e9, 0)]
            for _ in range(rounds):
                for side, program in enumerate(([kvasir, "img"], ["qemu-img"])):
                    if result and os.path.exists(result):
                        os.remove(result)
                    if before:
                        before()
                    spent, cpu, memory = measure(program + arguments)
                    best[side] = (min(best[side][0], spent), min(best[side][1], cpu), max(best[side][2], memory))
            rows.append((name, best[0], best[1]))
            print(".", end="", flush=True)

        raw = at("disk.raw")
        make_raw(raw)
        filled = at("filled.qcow2")
        empty = at("empty.qcow2")
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, filled], check=True)
        case("convert raw to qcow2", ["convert", "-f", "raw", "-O", "qcow2", raw, at("o")], result=at("o"))
        case("convert raw to qcow2, source on disk", ["convert", "-f", "raw", "-O", "qcow2", raw, at("o")], before=lambda: drop_cache(raw), result=at("o"))
        case("convert qcow2 to raw", ["convert", "-f", "qcow2", "-O", "raw", filled, at("o")], result=at("o"))
        case("convert qcow2 to raw, source on disk", ["convert", "-f", "qcow2", "-O", "raw", filled, at("o")], before=lambda: drop_cache(filled), result=at("o"))
        case("convert -c zlib -m 2", ["convert", "-f", "raw", "-c", "-m", "2", "-O", "qcow2", raw, at("o")], result=at("o"), rounds=min(ROUNDS, 2))
        case("convert -c zstd -m 2", ["convert", "-f", "raw", "-c", "-m", "2", "-O", "qcow2", "-o", "compression_type=zstd", raw, at("o")], result=at("o"), rounds=min(ROUNDS, 2))
        packed = at("packed.qcow2")
        zstd = at("zstd.qcow2")
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, packed], check=True)
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, zstd], check=True)
        case("convert compressed zlib to raw", ["convert", "-f", "qcow2", "-O", "raw", packed, at("o")], result=at("o"), rounds=min(ROUNDS, 3))
        case("convert compressed zstd to raw", ["convert", "-f", "qcow2", "-O", "raw", zstd, at("o")], result=at("o"), rounds=min(ROUNDS, 3))
        # The key derivation takes a given time by design: iter-time=10 keeps it out of the figure.
        case("convert raw to luks", ["convert", *SECRET, "-f", "raw", "-O", "luks", "-o", "key-secret=s,iter-time=10", raw, at("o")], result=at("o"), rounds=min(ROUNDS, 3))
        luks = at("disk.luks")
        subprocess.run(["qemu-img", "convert", *SECRET, "-O", "luks", "-o", "key-secret=s,iter-time=10", raw, luks], check=True)
        case("convert luks to raw", ["convert", *SECRET, "--image-opts", "-O", "raw", f"driver=luks,file.filename={luks},key-secret=s", at("o")], result=at("o"), rounds=min(ROUNDS, 3))
        huge = at("huge.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", huge, "50G"], check=True)
        case("check 50 GiB, metadata preallocated", ["check", huge])
        case("check filled", ["check", filled])
        case("compare raw with qcow2", ["compare", "-f", "raw", "-F", "qcow2", raw, filled])

        def fresh():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", empty, f"{MIB}M"], check=True)

        # A step that is odd in pages visits the whole disk, out of order.
        step = 4096 * 1237
        shared = ["-c", "200000", "-d", "32", "-s", "4096", "-S", str(step)]
        few = ["-c", "20000", "-d", "32", "-s", "4096", "-S", str(step)]
        case("bench 4 KiB reads, filled, depth 32", ["bench", "-f", "qcow2", *shared, filled])
        case("bench 4 KiB writes, filled, depth 32", ["bench", "-f", "qcow2", "-w", *shared, filled])
        case("bench 4 KiB reads, filled, O_DIRECT", ["bench", "-f", "qcow2", "-t", "none", *few, filled])
        case("bench 4 KiB writes, filled, O_DIRECT", ["bench", "-f", "qcow2", "-t", "none", "-w", *few, filled])
        case("bench 4 KiB reads, empty, depth 32", ["bench", "-f", "qcow2", *shared, empty], before=fresh)
        case("bench 4 KiB writes, empty, depth 32", ["bench", "-f", "qcow2", "-w", *few, empty], before=fresh)
        last = filled
        for i in range(10):
            above = at(f"chain{i}.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", os.path.abspath(last), "-F", "qcow2", above], check=True)
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q {i * 37 % MIB}M 1M", above], check=True)
            last = above
        case("bench 4 KiB reads, chain of 10, depth 32", ["bench", "-f", "qcow2", *shared, last])
        case("convert chain of 10 to raw", ["convert", "-f", "qcow2", "-O", "raw", last, at("o")], result=at("o"))
    print()
    table(rows)
    with open("artifacts/bench/block.json", "w") as file:
        sides = lambda row: {side: dict(zip(("seconds", "cpu", "peak_kib"), row[i + 1])) for i, side in enumerate(("kvasir", "qemu-img"))}
        json.dump({row[0]: sides(row) for row in rows}, file, indent=2)


main()
