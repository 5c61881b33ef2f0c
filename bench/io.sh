#!/bin/sh
# The device side of disks alone: virtio-blk's one thread, driven by a driver in the same process, against a minimal C program that makes the same
# host calls. 4 KiB requests at random places of a file in the page cache.
#
#   bench/io.sh [COUNT]
set -u
cd -- "$(dirname -- "$0")/.." || exit 1
count=${1:-400000}
work=artifacts/bench
mkdir -p "$work"
program=bench/io/Kvasir.Io.Bench/bin/Release/net10.0/Kvasir.Io.Bench
dotnet build bench/io/Kvasir.Io.Bench -c Release -v quiet --nologo </dev/null >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
cc -O2 -o "$work/requests" bench/io/requests.c || exit 1
file=$(mktemp "${TMPDIR:-/tmp}/kvasir-io.XXXXXX") || exit 1
trap 'rm -f "$file"' EXIT
dd if=/dev/urandom of="$file" bs=1M count=64 2>/dev/null
most() { sort -n | tail -n 1; }
for kind in read write; do
  : >"$work/c"
  : >"$work/cs"
  # In turn, so that both meet the same load; the best of each is what counts on a shared machine.
  for round in 1 2 3 4 5; do
    "$work/requests" $kind "$file" "$count" >>"$work/c" || exit 1
    "$program" $kind "$file" "$count" >>"$work/cs" || exit 1
  done
  c=$(most <"$work/c")
  cs=$(most <"$work/cs")
  echo "4 KiB random ${kind}s: ${cs% *} requests/s through virtio-blk, $c requests/s in minimal C, ratio $(awk "BEGIN { printf \"%.2f\", ${cs% *} / $c }"), ${cs#* } bytes allocated each"
done
