#!/bin/sh
# Measures Kvasir against QEMU's software CPU on this machine, in one run, and prints what it measured and nothing else.
#
#   ./bench.sh boot [N]   default guest, from start to its shell's prompt; both with the same kernel and initial file system
#   ./bench.sh life [N]   a VM of 512 MiB whose ROM leaves through isa-debug-exit at once: wall time and peak memory
#   ./bench.sh mips [N]   a loop of integer instructions in the guest's kernel mode
#   ./bench.sh idle [N]   processor time of a guest that waits at its prompt for 10 s
#
# N is how often (default: 5). Results also go to artifacts/bench/WHAT.json. Without qemu-system-x86_64 only Kvasir is measured.
set -u
cd -- "$(dirname -- "$0")" || exit 1
what=${1:-}
runs=${2:-5}
case $what in
  boot | life | mips | idle) ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
command -v python3 >/dev/null || { echo "bench.sh: python3 is missing: install the package python3" >&2; exit 1; }
./kvasir --version >/dev/null || exit 1
exec python3 bench/measure.py "$what" "$runs"
