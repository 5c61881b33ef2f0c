#!/bin/sh
# The device side of disks alone: virtio-blk's one thread, driven by a driver in the same process, against a minimal C program that makes the same
# host calls. 4 KiB requests at random places of a file in the page cache. Then a full Debian (io_guest.py).
#
#   bench/io.sh                          both
#   bench/io.sh device [COUNT]           the device side alone
#   bench/io.sh guest [RUNS [SECONDS]]   Debian alone, so often, with so many seconds for each kind of traffic
set -u
cd -- "$(dirname -- "$0")/.." || exit 1
case ${1:-} in
  guest)
    shift
    exec python3 bench/io_guest.py "$@"
    ;;
  device) shift ;;
  "") sh "$0" device && exec python3 bench/io_guest.py || exit 1 ;;
  *) sed -n '5,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
count=${1:-400000}
work=artifacts/bench
mkdir -p "$work"
program=bench/io/Kvasir.Io.Bench/bin/Release/net10.0/Kvasir.Io.Bench
dotnet build bench/io/Kvasir.Io.Bench -c Release -v quiet --nologo </dev/null >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
cc -O2 -o "$work/requests" bench/io/requests.c || exit 1
file=$(mktemp "${TMPDIR:-/tmp}/kvasir-io.XXXXXX") || exit 1
trap 'rm -f "$file"' EXIT
# The middle one of seven.
middle() { cut -d ' ' -f "$1" | sort -n | sed -n 4p; }
ratio() { awk "BEGIN { printf \"%.2f\", $1 / $2 }"; }
# ext4 keeps what came in large writes in large folios, and each small write into one of these takes the host longer: so writes of both.
for how in "read 1 MiB" "write 1 MiB" "write 4 KiB"; do
  kind=${how%% *}
  piece=${how#* }
  case $piece in
    "1 MiB") dd if=/dev/urandom of="$file" bs=1M count=64 2>/dev/null ;;
    *) dd if=/dev/urandom of="$file" bs=4K count=16384 2>/dev/null ;;
  esac
  : >"$work/c"
  : >"$work/cs"
  # In turn, so that both meet the same load.
  for round in 1 2 3 4 5 6 7; do
    "$work/requests" $kind "$file" "$count" >>"$work/c" || exit 1
    "$program" $kind "$file" "$count" >>"$work/cs" || exit 1
  done
  for column in 1 2; do
    c=$(middle $column <"$work/c")
    cs=$(middle $column <"$work/cs")
    [ $column = 1 ] && what="a second" || what="a second of processor time of the thread"
    echo "4 KiB random ${kind}s in a file written in pieces of $piece, $what: $cs through virtio-blk, $c in minimal C, ratio $(ratio "$cs" "$c")"
  done
  echo "bytes allocated a request: $(cut -d ' ' -f 3 "$work/cs" | sort -n | head -n 1)"
done
# Limits of a disk: what is asked, in requests of 4 KiB a second, and what comes of it in about four seconds.
for limit in "iops=500 500" "iops=20000 20000" "bps=8192000 2000" "iops=3000,bps=4096000 1000"; do
  asked=${limit#* }
  for kind in read write; do
    reached=$("$program" $kind "$file" $((asked * 4)) "${limit% *}") || exit 1
    echo "${kind}s limited by ${limit% *}: $reached a second, of what was asked $(ratio "$reached" "$asked")"
  done
done
