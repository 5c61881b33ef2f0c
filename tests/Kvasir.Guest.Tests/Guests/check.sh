#!/bin/sh
# Runs inside the guest: exercises processes, signals, pipes, floating point and data with known answers. One line a check, "PASS name" or
# "FAIL name: ...", then "CHECKED n, m failed". Expected values are those of any correct machine; none depends on this one.
passed=0
failed=0

# check NAME EXPECTED ACTUAL
check() {
  if [ "$2" = "$3" ]; then
    passed=$((passed + 1))
    echo "PASS $1"
  else
    failed=$((failed + 1))
    echo "FAIL $1: expected '$2', got '$3'"
  fi
}

# First word of a checksum's line.
sum() { "$1" | cut -d ' ' -f 1; }

# Waits, up to ten minutes on the guest's clock, until a process is in a state of proc(5); prints the state it is in then.
state_of() {
  tries=0
  while state=$(awk '/^State/ { print $2 }' "/proc/$1/status"); [ "$state" != "$2" ] && [ $tries -lt 6000 ]; do
    tries=$((tries + 1))
    sleep 0.1
  done
  echo "$state"
}

work=/tmp/check.$$
mkdir -p $work
cd $work || exit 1

# Integer arithmetic
check multiply 121932631112635269 $((123456789 * 987654321))
check divide '-13 -9 124999999' "$((-1234567 / 94966)) $((-100009 % 20)) $((987654321987654321 / 7901234591))"
check shift '1152921504606846976 -1 -2147483648' "$((1 << 60)) $((-1 >> 63)) $((-4294967296 >> 1))"

# Processes
check exit-code 37 "$(sh -c 'exit 37'; echo $?)"
check subshell '1 2 1' "$(x=1; echo $x $(x=2; echo $x) $x)"
check arguments 1500 "$(sh -c 'echo $#' sh $(seq 1 1500))"
check environment 'value of a variable' "$(VARIABLE='value of a variable' /bin/busybox env | sed -n 's/^VARIABLE=//p')"
check not-found 127 "$(sh -c '/no/such/program' 2>/dev/null; echo $?)"
count=0
while [ $count -lt 60 ]; do
  /bin/busybox true || break
  count=$((count + 1))
done
check fork-exec 60 $count
check exec-chain end "$(exec sh -c 'exec sh -c "exec echo end"')"

# Pipes
check pipeline 271 "$(seq 1 1000 | grep 7 | wc -l)"
check long-pipe 108894 "$(seq 1 20000 | cat | cat | cat | cat | cat | wc -c)"
check broken-pipe 3 "$(yes | head -n 3 | wc -l)"
mkfifo fifo
(
  for writer in 1 2 3 4; do
    (seq 1 250 | while read -r line; do echo "$writer $line"; done) &
  done
  wait
) >fifo &
check fifo '1000 250 250 250 250' "$(sort -n fifo | awk '{ seen[$1]++; sum[$1] += $2 } END { for (i = 1; i <= 4; i++) if (sum[i] != 31375) print "lost"
  printf "%d %d %d %d %d\n", NR, seen[1], seen[2], seen[3], seen[4] }')"
wait

# Signals
check terminated 143 "$(sh -c 'kill -TERM $$'; echo $?)"
check killed 137 "$(sh -c 'kill -KILL $$'; echo $?)"
check segmentation 139 "$(sh -c 'kill -SEGV $$' 2>/dev/null; echo $?)"
check trap 25 "$(sh -c 'n=0; trap "n=\$((n + 1))" USR1; i=0; while [ $i -lt 25 ]; do kill -USR1 $$; i=$((i + 1)); done; echo $n')"
check exit-trap 'body leaving' "$(sh -c 'trap "echo leaving" EXIT; printf "body "')"
sleep 1000 &
child=$!
kill -STOP $child
check stopped T "$(state_of $child T)"
kill -CONT $child
check continued S "$(state_of $child S)"
kill $child
wait $child 2>/dev/null
check reaped 143 $?
check timeout 143 "$(timeout 1 sleep 1000; echo $?)"

# Job control
jobs_seen=$(sh -m -c 'sleep 1000 & kill -STOP %1; n=0; while jobs >jobs; ! grep -q Stopped jobs && [ $n -lt 300 ]; do sleep 0.2; n=$((n + 1)); done; grep -c Stopped jobs; kill -CONT %1; kill %1' 2>/dev/null)
check job-control 1 "$jobs_seen"

# Floating point, by series: this awk may have no functions. Twelve digits: x87 and SSE round intermediate results differently.
check sqrt '1.414213562373 1.732050807569' "$(awk 'function root(x) { r = x; for (i = 0; i < 20; i++) r = (r + x / r) / 2; return r }
  BEGIN { printf "%.12f %.12f\n", root(2), root(3) }')"
check sin-cos '0.841470984808 0.540302305868' "$(awk 'BEGIN { s = c = 0; t = 1; for (i = 0; i < 24; i++) {
  if (i % 2) s += (i % 4 == 1) ? t : -t; else c += (i % 4 == 0) ? t : -t; t = t / (i + 1) } printf "%.12f %.12f\n", s, c }')"
check exp '2.718281828459 22026.465794807' "$(awk 'function e(x) { s = 0; t = 1; for (i = 1; i < 80; i++) { s += t; t = t * x / i } return s }
  BEGIN { printf "%.12f %.9f\n", e(1), e(10) }')"
check power '1.267650600228e+30 0.000977' "$(awk 'BEGIN { p = 1; q = 1; for (i = 0; i < 100; i++) p *= 2; for (i = 0; i < 10; i++) q /= 2
  printf "%.12e %.6f\n", p, q }')"
check harmonic 7.485470860550 "$(awk 'BEGIN { for (i = 1; i <= 1000; i++) s += 1 / i; printf "%.12f\n", s }')"
check pi 3.140592653840 "$(awk 'BEGIN { for (i = 0; i < 1000; i++) s += (i % 2 ? -4 : 4) / (2 * i + 1); printf "%.12f\n", s }')"
check infinity '1 1' "$(awk 'BEGIN { x = 1; for (i = 0; i < 2000; i++) x *= 2; print (-x < x), (1 / x == 0) }')"
check rounding '1 1.5 -2 2 0.1' "$(awk 'BEGIN { print 1e0, 3 / 2, int(-2.9), int(2.9), 0.1 }')"
check convert '2147483647 -2147483648 0.333333' "$(printf '%d %d %f' 2147483647 -2147483648 0.333333333)"
check decimal '123456789012345680 0.1000000000000000055511151231' "$(awk 'BEGIN { printf "%.17g %.28f\n", 123456789012345678, 0.1 }' | sed 's/1.2345678901234568e+17/123456789012345680/')"

# Data
seq 1 20000 >numbers
check md5 e071f707df7bbeee2a6a1eb48011ddd0 "$(sum md5sum <numbers)"
check sha1 49972ff155d0d5fb6bb9d8f18a7a4c4a2ea9562c "$(sum sha1sum <numbers)"
check sha256 f6351f5ead9a700e34275480b3856ea738122a7c57bdeb744a631251c069587a "$(sum sha256sum <numbers)"
check sha512 7686a0fb0b50564b3e6f2e2ab9bdcbd55d450d1add4bc3ad888d32c51013c3e86eb9d4d89466904cc65a049c1b8e38615df616b31902701b1c81216a9cc5b42b "$(sum sha512sum <numbers)"
check gzip e071f707df7bbeee2a6a1eb48011ddd0 "$(gzip -c numbers | gunzip -c | sum md5sum)"
check bzip2 e071f707df7bbeee2a6a1eb48011ddd0 "$(head -n 20000 numbers | bzip2 -c | bunzip2 -c | sum md5sum)"
check base64 e071f707df7bbeee2a6a1eb48011ddd0 "$(base64 numbers | base64 -d | sum md5sum)"
check zeros b6d81b360a5672d80c27430f39153e2c "$(dd if=/dev/zero bs=64k count=16 2>/dev/null | sum md5sum)"
check sort cbbadb8d05e34e11d9fc26886e36f6fb "$(awk '{ print ($1 * 7919) % 20011 }' numbers | sort -n | sum md5sum)"
check sort-text c7345da82422f5bbfb30e41a05540dc3 "$(sort -r numbers | sum md5sum)"
check sed-tr 6d67f69334fa713483d1ef1884431001 "$(sed 's/1\([0-9]\)/<\1>/g' numbers | tr '<>' '()' | sum md5sum)"
dd if=/dev/urandom of=random bs=4096 count=64 2>/dev/null
check random-size 262144 "$(wc -c <random)"
cp random copy && cmp random copy
check copy 0 $?
check tar e071f707df7bbeee2a6a1eb48011ddd0 "$(tar cf - numbers | tar xOf - | sum md5sum)"

# The clock
before=$(awk '{ printf "%d", $1 * 100 }' /proc/uptime)
sleep 0.5
after=$(awk '{ printf "%d", $1 * 100 }' /proc/uptime)
check sleep 1 $((after - before >= 49))

cd /
rm -r $work
echo "CHECKED $((passed + failed)), $failed failed"
