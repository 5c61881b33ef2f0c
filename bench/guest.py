"""Builds the guest of `bench.sh cpu`: Debian packages unpacked without installing them, and the loads of bench/cpu, as an initial file system and
as a folder to run the same files natively. Everything is kept in the user's cache; root is not needed."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import time

SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cpu")
# What the loads run, and what the stress of several processors runs besides.
PACKAGES = [
    "busybox-static", "dash", "coreutils", "findutils", "grep", "sed", "mawk", "gzip", "p7zip-full", "python3.11-minimal", "openssl", "sqlite3", "sysbench", "stress-ng",
    "make", "tcc",
]
# Dependencies that nothing here loads.
UNUSED = {"dpkg", "tar", "debconf", "perl-base", "install-info", "readline-common", "mariadb-common", "mysql-common", "libx11-data", "libdrm-common", "libsasl2-modules-db"}
PRUNED = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/share/bug", "usr/share/X11", "usr/lib/x86_64-linux-gnu/gconv",
          "usr/lib/python3/dist-packages", "usr/share/zsh", "usr/share/bash-completion", "var/lib/dpkg", "usr/share/doc-base"]
CFLAGS = ["-O2", "-Wall", "-Wextra", "-fno-tree-vectorize", "-fno-tree-loop-distribute-patterns", "-static", "-pthread"]
RECIPE = b"2"
# What nobody has asked for this long goes.
KEPT_SECONDS = 2 * 86400
DATA_LENGTH = 4 << 20


class GuestError(Exception):
    """The guest cannot be built here; the text says why and what to do."""


def cache():
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not home.startswith("/"):
        home = os.path.join(os.environ.get("HOME", "/tmp"), ".cache")
    return os.path.join(home, "kvasir", "bench")


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command, **options):
    """Runs a command to its end; its output is the error's text where it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command[:6])} ... ended with code {done.returncode}:\n{done.stdout.decode('utf8', 'replace')[-2000:]}")
    return done.stdout.decode("utf8", "replace")


class Archive:
    """The distribution's packages through apt: the system's lists where they are there, else lists in the cache."""

    def __init__(self, folder):
        self.private = os.path.join(folder, "apt")
        self.options = ["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]

    def closure(self, packages):
        """All packages that some need, themselves included."""
        os.makedirs(self.private, exist_ok=True)
        status = os.path.join(self.private, "status")
        with open(status, "w", encoding="ascii"):
            pass
        command = ["apt-get", *self.options, "-o", f"Dir::State::status={status}", "install", "--print-uris", "-qq", "--no-install-recommends", *packages]
        try:
            lines = run(command)
        except GuestError:
            self.refresh(status)
            lines = run(["apt-get", *self.options, *command[len(self.options) + 1:]])
        names = [line.split()[1].split("_")[0] for line in lines.splitlines() if line.startswith("'")]
        return sorted(name for name in names if name not in UNUSED)

    def refresh(self, status):
        say("refreshing package lists")
        if os.geteuid() != 0:
            for name in ("lists/partial", "archives/partial"):
                os.makedirs(os.path.join(self.private, name), exist_ok=True)
            self.options += ["-o", f"Dir::State={self.private}", "-o", f"Dir::State::Lists={self.private}/lists", "-o", f"Dir::State::status={status}",
                             "-o", f"Dir::Cache={self.private}", "-o", "APT::Update::Post-Invoke-Success=", "-o", "APT::Update::Post-Invoke="]
        run(["apt-get", *self.options, "-q", "update"])

    def download(self, packages, folder):
        os.makedirs(folder, exist_ok=True)
        run(["apt-get", *self.options, "-q", "download", *packages], cwd=folder)
        return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".deb"))


def digest(*parts):
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
        whole.update(b"\0")
    return whole.hexdigest()[:12]


def contents(name):
    with open(os.path.join(SOURCES, name), "rb") as file:
        return file.read()


def unpack(packages, root):
    """Unpacks package files. Folders that Debian has merged into /usr are links from the beginning."""
    for name in ("bin", "sbin", "lib", "lib64"):
        os.makedirs(os.path.join(root, "usr", name), exist_ok=True)
        os.symlink(f"usr/{name}", os.path.join(root, name))
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as reader:
            run_from = subprocess.run(["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", root], stdin=reader.stdout, stderr=subprocess.PIPE)
        if reader.returncode != 0 or run_from.returncode != 0:
            raise GuestError(f"cannot unpack {package}: {run_from.stderr.decode('utf8', 'replace')}")
    for name in PRUNED:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def complete(root):
    """What packages leave to their installation scripts."""
    for link, target in (("usr/bin/sh", "dash"), ("usr/bin/awk", "mawk")):
        path = os.path.join(root, link)
        if not os.path.lexists(path):
            os.symlink(target, path)
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "etc", "bench"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    with open(os.path.join(root, "etc/passwd"), "w", encoding="ascii") as file:
        file.write("root:x:0:0:root:/root:/bin/sh\n")
    with open(os.path.join(root, "etc/group"), "w", encoding="ascii") as file:
        file.write("root:x:0:\n")
    # Text to compress: Python's own library, in a fixed order.
    library = os.path.join(root, "usr/lib/python3.11")
    text = bytearray()
    for folder, folders, names in os.walk(library):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                with open(os.path.join(folder, name), "rb") as file:
                    text += file.read()
    if not text:
        raise GuestError("the package libpython3.11-minimal has no library: the loads have no text to work on")
    while len(text) < DATA_LENGTH:
        text += bytes(text)
    with open(os.path.join(root, "bench/data"), "wb") as file:
        file.write(text[:DATA_LENGTH])
    # The machine's own openssl makes the key: it is data.
    run(["openssl", "genrsa", "-out", os.path.join(root, "bench/key.pem"), "2048"])


def write_cpio(path, root, names=None):
    """Writes a folder as a "newc" archive, owned by root (Linux Documentation/driver-api/early-userspace/buffer-format.rst)."""
    inode = 1
    with open(path, "wb") as output:

        def entry(name, mode, content):
            nonlocal inode
            fields = [inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
            header = b"070701" + b"".join(b"%08x" % field for field in fields) + name + b"\0"
            output.write(header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4))
            inode += 1

        def add(name):
            full = os.path.join(root, name)
            status = os.lstat(full)
            if stat.S_ISLNK(status.st_mode):
                entry(name.encode(), stat.S_IFLNK | 0o777, os.readlink(full).encode())
            elif stat.S_ISDIR(status.st_mode):
                entry(name.encode(), stat.S_IFDIR | 0o755, b"")
            elif stat.S_ISREG(status.st_mode):
                with open(full, "rb") as file:
                    entry(name.encode(), stat.S_IFREG | (status.st_mode & 0o777 | 0o444), file.read())

        if names is not None:
            for name in names:
                add(name)
        else:
            for folder, folders, files in os.walk(root):
                folders.sort()
                for name in sorted(folders + files):
                    add(os.path.relpath(os.path.join(folder, name), root))
        entry(b"TRAILER!!!", 0, b"")


class Guest:
    """Paths of a built guest: `root` to run natively, `initrd` for VMs."""

    def __init__(self, root, initrd):
        self.root = root
        self.initrd = initrd


def base(folder):
    """The packages' part, which changes with the list of packages only."""
    name = digest(RECIPE, " ".join(PACKAGES + sorted(UNUSED) + PRUNED).encode(), str(DATA_LENGTH).encode())
    final = os.path.join(folder, f"base-{name}")
    if os.path.isdir(final):
        return final
    for tool in ("apt-get", "dpkg-deb", "tar", "openssl"):
        if not shutil.which(tool):
            raise GuestError(f"{tool} is missing: the guest is made from Debian packages")
    temporary = f"{final}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    archive = Archive(folder)
    packages = archive.closure(PACKAGES)
    say(f"fetching {len(packages)} packages")
    files = archive.download(packages, os.path.join(temporary, "packages"))
    say("unpacking")
    root = os.path.join(temporary, "root")
    os.makedirs(root)
    unpack(files, root)
    complete(root)
    shutil.rmtree(os.path.join(temporary, "packages"))
    write_cpio(os.path.join(temporary, "base.cpio"), root)
    os.rename(temporary, final)
    return final


def loads(bottom, final, sources):
    """The loads' part, on top of the packages' files (by hard links)."""
    if not shutil.which("gcc") or not os.path.isabs(run(["gcc", "-print-file-name=libc.a"]).strip()):
        raise GuestError("gcc or its static C library is missing: install the packages gcc and libc6-dev")
    temporary = f"{final}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    root = os.path.join(temporary, "root")
    target = os.path.join(root, "bench")
    run(["cp", "-al", os.path.join(bottom, "root"), root])
    # That our own sources do not compile is a defect, and no lack of the host's.
    subprocess.run(["gcc", *CFLAGS, "-o", os.path.join(target, "load"), *(os.path.join(SOURCES, source) for source in sources if source.endswith(".c"))], check=True)
    for source in sources:
        if not source.endswith((".c", ".h")):
            shutil.copy(os.path.join(SOURCES, source), os.path.join(target, source))
    shutil.copy(os.path.join(SOURCES, "init.sh"), os.path.join(root, "init"))
    os.chmod(os.path.join(root, "init"), 0o755)
    overlay = os.path.join(temporary, "overlay.cpio")
    own = sorted(f"bench/{name}" for name in os.listdir(target) if name not in ("data", "key.pem"))
    write_cpio(overlay, root, ["init", "bench", *own])
    # A kernel unpacks the archives that follow one another.
    with open(os.path.join(temporary, "initrd.cpio"), "wb") as output:
        for part in (os.path.join(bottom, "base.cpio"), overlay):
            with open(part, "rb") as file:
                shutil.copyfileobj(file, output)
    os.unlink(overlay)
    os.rename(temporary, final)


def build():
    """Finds the guest or builds it. Each version of the loads has a folder of its own, for whoever still runs an older one."""
    folder = cache()
    with locked(folder):
        bottom = base(folder)
        sources = sorted(os.listdir(SOURCES))
        name = digest(" ".join(CFLAGS).encode(), bottom.encode(), *(part for source in sources for part in (source.encode(), contents(source))))
        final = os.path.join(folder, f"guest-{name}")
        if not os.path.isdir(final):
            loads(bottom, final, sources)
        os.utime(final)
        for old in os.listdir(folder):
            path = os.path.join(folder, old)
            if old.startswith(("guest-", "base-")) and path not in (bottom, final) and os.stat(path).st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(path)
        os.utime(bottom)
        return Guest(os.path.join(final, "root"), os.path.join(final, "initrd.cpio"))


if __name__ == "__main__":
    try:
        built = build()
    except GuestError as error:
        raise SystemExit(f"bench: {error}") from None
    print(built.root)
    print(built.initrd)
