"""Runs a program where this host's name server is one that knows answer.test alone: dns.py PROGRAM [ARGUMENT...], in mount and network namespaces of its own."""
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
ADDRESSES = {1: socket.inet_pton(socket.AF_INET, "192.0.2.7"), 28: socket.inet_pton(socket.AF_INET6, "2001:db8::7")}


def serve(server):
    while True:
        query, asker = server.recvfrom(4096)
        end = 12
        while query[end]:
            end += 1 + query[end]
        kind = struct.unpack_from(">H", query, end + 1)[0]
        known = query[12:end].lower() == b"\6answer\4test"
        data = ADDRESSES.get(kind, b"") if known else b""
        # Response, recursion available; "no such name" for all but the one.
        answer = query[:2] + struct.pack(">HHHHH", 0x8180 | (0 if known else 3), 1, 1 if data else 0, 0, 0) + query[12 : end + 5]
        if data:
            answer += struct.pack(">HHHIH", 0xC00C, kind, 1, 60, len(data)) + data
        server.sendto(answer, asker)


def main():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # SIOCSIFFLAGS: the loopback interface is up and running.
        fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", 0x41))
    with open("resolv.conf", "w") as file:
        file.write("nameserver 127.0.0.1\n")
    bind = 4096
    if libc.mount(b"resolv.conf", b"/etc/resolv.conf", None, bind, None) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    parent = os.getpid()
    if os.fork() == 0:
        # PR_SET_PDEATHSIG: it ends with the program.
        libc.prctl(1, signal.SIGKILL)
        if os.getppid() == parent:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            serve(server)
        os._exit(0)
    os.execv(sys.argv[1], sys.argv[1:])


main()
