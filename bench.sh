#!/bin/sh
# Measures, and prints what it measured and nothing else.
#
#   ./bench.sh boot [N]   default guest, from start to its shell's prompt; kvasir and qemu tcg with the same kernel and initial file system
#   ./bench.sh life [N]   a VM of 512 MiB whose ROM leaves through isa-debug-exit at once: wall time and peak memory; on KVM too, where it is
#   ./bench.sh mips [N]   a loop of integer instructions in the guest's kernel mode
#   ./bench.sh idle [N]   processor time of a guest that waits at its prompt for 10 s
#   ./bench.sh cpu        compute kernels, real programs and kernel-heavy loads: native, kvasir, qemu tcg (./bench.sh cpu --help)
#   ./bench.sh events [N] TLB misses, page faults and port accesses, in nanoseconds
#   ./bench.sh kvm        port-I/O exits through a device in C# against a minimal C program; a VM's life; the choice of --accel auto
#   ./bench.sh block      the image tool and the block layer against qemu-img
#   ./bench.sh io         virtio-blk's device side against a minimal C program; then a full Debian with fio and iperf3; kvasir and qemu tcg with the same image
#   ./bench.sh soak [M]   M minutes (10) of verified disk and network traffic in a Debian: memory, descriptors and threads of the process meanwhile
#   ./bench.sh net        networks
#
# N is how often (default: 5). Results also go to artifacts/bench/WHAT.json. Without qemu-system-x86_64 only Kvasir is measured.
# The environment variable KVASIR names another kvasir program to measure.
set -u
cd -- "$(dirname -- "$0")" || exit 1
what=${1:-}
[ $# -gt 0 ] && shift

python() {
  command -v python3 >/dev/null || { echo "bench.sh: python3 is missing: install the package python3" >&2; exit 1; }
  exec python3 "$@"
}

case $what in
  boot | life | mips | idle) python bench/measure.py "$what" "$@" ;;
  cpu) python bench/cpu.py "$@" ;;
  events) python bench/events.py "$@" ;;
  soak) python bench/soak.py "$@" ;;
  kvm | block | io | net)
    [ -f "bench/$what.sh" ] || { echo "bench.sh: there is nothing to measure '$what' with yet" >&2; exit 1; }
    exec sh "bench/$what.sh" "$@"
    ;;
  *) sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
