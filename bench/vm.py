"""Starting what bench.sh measures, and reading the clocks of its processes."""

import os
import select
import shutil
import signal
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QEMU = shutil.which("qemu-system-x86_64")
RESULTS = os.path.join(ROOT, "artifacts", "bench")
# The kernel counts timer ticks over tens of milliseconds and panics where a busy host made them late.
LINUX_APPEND = "console=ttyS0 quiet no_timer_check"


class BenchError(Exception):
    """What was measured went wrong; the text says how."""


def find_kvasir():
    """The command that KVASIR names, or the checkout's own, built where it is older than its sources."""
    named = os.environ.get("KVASIR")
    if named:
        if not os.access(named, os.X_OK):
            raise BenchError(f"KVASIR names '{named}', which is no program")
        return named
    wrapper = os.path.join(ROOT, "kvasir")
    if subprocess.run([wrapper, "--version"], stdout=subprocess.DEVNULL).returncode != 0:
        raise BenchError("./kvasir could not be built")
    built = os.path.join(ROOT, "out", "current", "kvasir")
    # Past the link: another build meanwhile does not change what is measured.
    return os.path.realpath(built) if os.path.exists(built) else wrapper


def default_guest(kvasir):
    """Kernel and initial file system of the default guest."""
    done = subprocess.run([kvasir, "guest"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise BenchError("the default guest cannot be had here")
    kernel, initrd = done.stdout.split("\n")[:2]
    return kernel, initrd


def kvasir_linux(kvasir, kernel, initrd, *options, machine="q35", memory=512, cpus=1, append=LINUX_APPEND):
    return [kvasir, "run", "--machine", machine, "--memory", f"{memory}M", "--cpus", str(cpus), "--kernel", kernel, "--initrd", initrd, "--append", append, *options]


def qemu_linux(kernel, initrd, *options, machine="q35", memory=512, cpus=1, append=LINUX_APPEND):
    accelerator = "tcg,thread=multi" if cpus > 1 else "tcg"
    return [QEMU, "-accel", accelerator, "-cpu", "max", "-machine", machine, "-m", str(memory), "-smp", str(cpus), "-display", "none", "-monitor", "none", "-no-user-config",
            "-nodefaults", "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", append, *options]


def processor_seconds(process):
    """Processor time of all threads of a process of ours, to the nanosecond: the clock that clock_getcpuclockid(3) names."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return None


class Console:
    """A process with its console on pipes: lines are typed, and what it prints is read line by line."""

    def __init__(self, name, command, log=None):
        self.name = name
        self.command = command
        self.begun = time.perf_counter()
        self._log = open(log, "wb") if log else None
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        self._pending = b""
        self._seen = b""

    @property
    def process(self):
        return self._process.pid

    def processor_seconds(self):
        return processor_seconds(self._process.pid)

    def type(self, line):
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BenchError(self.failure(f"takes no input ({error.strerror})")) from None

    def line(self, deadline):
        """The next line, or an error where the process ends or the time does."""
        while b"\n" not in self._pending:
            left = deadline - time.perf_counter()
            if left <= 0:
                raise BenchError(self.failure("did not answer in time"))
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            if ready:
                self._read()
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode("latin1").strip("\r")

    def wait(self, text, limit):
        """Reads on until a text has come, which need not be followed by the end of a line."""
        deadline = time.perf_counter() + limit
        while text not in self._pending:
            left = deadline - time.perf_counter()
            if left <= 0:
                raise BenchError(self.failure(f"did not print {text!r} in time"))
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            if ready:
                self._read()
        self._pending = self._pending[self._pending.index(text) + len(text):]

    def end(self, limit):
        """Waits for the process's own end."""
        deadline = time.perf_counter() + limit
        while time.perf_counter() < deadline:
            ready, _, _ = select.select([self._process.stdout], [], [], 1)
            if ready and not os.read(self._process.stdout.fileno(), 65536):
                self._process.wait()
                return
        raise BenchError(self.failure("did not end"))

    def _read(self):
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise BenchError(self.failure(f"ended with code {self._process.wait()}"))
        if self._log:
            self._log.write(data)
            self._log.flush()
        self._seen = (self._seen + data)[-4000:]
        self._pending += data

    def expect(self, text, limit):
        """The first line that begins with a text."""
        deadline = time.perf_counter() + limit
        while True:
            line = self.line(deadline)
            # The firmware's and the kernel's last words may stand before it.
            if text in line:
                return line[line.index(text):]

    def failure(self, what):
        return f"{self.name} {what}; its last words:\n{self._seen[-1500:].decode('latin1')}"

    def close(self):
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        if self._log:
            self._log.close()
