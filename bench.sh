#!/bin/sh
# Measures, and prints what it measured.
#
#   ./bench.sh kvm        port-I/O exits through a device in C# against a minimal C program; a VM's life; the choice of --accel auto
set -u
cd -- "$(dirname -- "$0")" || exit 1
work=artifacts/bench
mkdir -p "$work"

least() { sort -n | head -n 1; }

kvm() {
  [ -c /dev/kvm ] || { echo "/dev/kvm is missing: nothing to measure"; return 0; }
  program=bench/Kvasir.Kvm.Bench/bin/Release/net10.0/Kvasir.Kvm.Bench
  dotnet build bench/Kvasir.Kvm.Bench -c Release -v quiet --nologo </dev/null >"$work/build.log" 2>&1 || { cat "$work/build.log"; return 1; }
  cc -O2 -o "$work/exits" bench/kvm/exits.c || return 1
  : >"$work/c"
  : >"$work/cs"
  # In turn, so that both meet the same load; the least of each is what counts on a shared machine.
  for round in 1 2 3 4 5 6 7; do
    "$work/exits" 20000 >>"$work/c" || return 1
    "$program" exits 20000 >>"$work/cs" || return 1
  done
  c=$(least <"$work/c")
  cs=$(least <"$work/cs")
  echo "port-I/O exit and re-entry: $cs ns in C#, $c ns in minimal C, ratio $(awk "BEGIN { printf \"%.2f\", $cs / $c }")"
  echo "a VM from its making to its end: $("$program" life 200) us (1 MiB, one vCPU, one exit; 200 in turn)"
  echo "looking at KVM for --accel auto, start of the runtime's compiler included: $("$program" probe)"
}

case ${1:-} in
  kvm) kvm ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
