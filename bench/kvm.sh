# bench.sh kvm: port-I/O exits through a device in C# against a minimal C program, a VM's life, and the look at KVM for --accel auto.
# Run from the checkout's folder.
set -u
work=artifacts/bench
mkdir -p "$work"

least() { sort -n | head -n 1; }

[ -c /dev/kvm ] || { echo "/dev/kvm is missing: nothing to measure"; exit 0; }
program=bench/Kvasir.Kvm.Bench/bin/Release/net10.0/Kvasir.Kvm.Bench
dotnet build bench/Kvasir.Kvm.Bench -c Release -v quiet --nologo -nodeReuse:false -p:UseSharedCompilation=false </dev/null >"$work/build.log" 2>&1 ||
  { cat "$work/build.log"; exit 1; }
cc -O2 -o "$work/exits" bench/kvm/exits.c || exit 1
: >"$work/c"
: >"$work/cs"
# In turn, so that both meet the same load; the least of each is what counts on a shared machine.
for round in 1 2 3 4 5 6 7; do
  "$work/exits" 20000 >>"$work/c" || exit 1
  "$program" exits 20000 >>"$work/cs" || exit 1
done
c=$(least <"$work/c")
cs=$(least <"$work/cs")
ratio=$(awk "BEGIN { printf \"%.2f\", $cs / $c }")
life=$("$program" life 200) || exit 1
probe=$("$program" probe) || exit 1
echo "port-I/O exit and re-entry: $cs ns in C#, $c ns in minimal C, ratio $ratio"
echo "a VM from its making to its end: $life us (1 MiB, one vCPU, one exit; 200 in turn)"
echo "looking at KVM for --accel auto, start of the runtime's compiler included: $probe"
printf '{ "benchmark": "kvm", "exit_ns": %s, "exit_c_ns": %s, "life_us": %s, "probe": "%s" }\n' "$cs" "$c" "$life" "$probe" >"$work/kvm.json"
