# smp.sh SECONDS: several processors under load for about that long, with results that are checked: stress-ng's own checks, threads that hand a lock
# over by futex, and a build of many short processes side by side. Prints "@PASS WHAT" or "@FAIL WHAT: WHY" for each, and "@SMP passed N, failed N" at last.
seconds=$1
load=/bench/load
cpus=$(nproc)
work=/tmp/smp
passed=0
failed=0
rm -rf $work
mkdir -p $work
cd $work || exit 1

now() { cut -d . -f 1 /proc/uptime; }
pass() { passed=$((passed + 1)); echo "@PASS $*"; }
fail() { failed=$((failed + 1)); echo "@FAIL $*"; }

# stress GROUP SECONDS OPTION...: stressors side by side; --verify has them check what they compute.
stress() {
  group=$1 for=$2
  shift 2
  stress-ng --verify --oomable --no-rand-seed --timeout "$for" --temp-path $work "$@" >stress.log 2>&1
  code=$?
  # 3: a stressor found no memory or processes when it started. What the one before left behind goes away.
  if [ $code = 3 ]; then
    sleep 2
    stress-ng --verify --oomable --no-rand-seed --timeout "$for" --temp-path $work "$@" >stress.log 2>&1
    code=$?
  fi
  if [ $code = 0 ] && ! grep -qE 'fail:|corrupt|mismatch' stress.log && grep -q 'successful run completed' stress.log; then
    pass "stress $group"
  else
    fail "stress $group: code $code: $(grep -E 'fail|corrupt|mismatch|error|unsuccessful' stress.log | head -n 5 | tr '\n' ';') $(tail -n 6 stress.log | tr '\n' ';')"
  fi
}

# 4 threads, 20,000 turns each with the lock, and a ring of 5,000 turns each. A lost wake-up would stand still: the limit tells it from slowness.
futex() {
  sum=$(timeout 300 $load futex | grep '^@SUM' | cut -d ' ' -f 3)
  if [ "$sum" = 0001388000004e20 ]; then pass futex; else fail "futex: '$sum'"; fi
}

# The tree of sources for the build; each has something of its own to compute.
sources() {
  mkdir -p tree
  i=0
  while [ $i -lt 24 ]; do
    cat >tree/part$i.c <<EOF
struct pair { int a, b; };
static int table[$((i + 3))];
static int step(struct pair *p) { p->a = p->a * $((i * 2 + 3)) + p->b; p->b ^= p->a >> 3; return p->a; }
int part$i(int n) { struct pair p = { n, $i }; int sum = 0; for (int j = 0; j < n; j++) { table[j % $((i + 3))] += step(&p); sum += table[j % $((i + 3))]; } return sum; }
EOF
    i=$((i + 1))
  done
  cat >tree/Makefile <<'EOF'
PARTS := $(patsubst %.c,%,$(wildcard part*.c))
all: sums
part%.o: part%.c
	@tcc -c -o $@ $<
part%.txt: part%.c
	@sed 's/int/long/g; s/part/piece/' $< | awk '{ n += length($$0); print NR, $$0 } END { print n }' | gzip -n -c | gunzip -c >$@
part%.sum: part%.o part%.txt
	@cat $^ | md5sum >$@
sums: $(addsuffix .sum,$(PARTS))
	@cat $(sort $^) | md5sum >$@
clean:
	@rm -f *.o *.txt *.sum sums
EOF
}

build() {
  make -s -C tree clean && make -s -C tree -j "$1" all >build.log 2>&1 && cat tree/sums
}

sources
expected=$(build 1)
[ -n "$expected" ] || fail "build with one job: $(tail -n 3 build.log | tr '\n' ';')"
end=$(($(now) + seconds))
each=$((seconds / 5))
[ $each -ge 2 ] || each=2
[ $each -le 30 ] || each=30
rounds=0
while :; do
  futex
  builds=0
  until=$(($(now) + each))
  while :; do
    got=$(build $((cpus + 1)))
    builds=$((builds + 1))
    if [ "$got" != "$expected" ]; then
      fail "build $builds: '$got', not '$expected': $(tail -n 3 build.log | tr '\n' ';')"
      break
    fi
    [ "$(now)" -lt $until ] || { pass "build ($builds)"; break; }
  done
  stress locks $each --futex "$cpus" --mutex "$cpus" --sem 1 --switch "$cpus" --pipe 1 --eventfd 1 --poll 1
  stress memory $each --vm "$cpus" --vm-bytes 16M --vm-keep --atomic 1 --memcpy 1 --malloc 1 --mmap 1 --mmap-bytes 8M --mremap 1 --mremap-bytes 4M --membarrier 1
  stress computing $each --cpu "$cpus" --matrix 1 --qsort 1 --qsort-size 16384 --hash 1 --funccall 1 --bsearch 1 --vecmath 1
  stress processes $each --pthread 1 --fork 1 --exec 1 --clone 1 --signal 1 --timer 1 --sigq 1 --nanosleep 1
  rounds=$((rounds + 1))
  [ "$(now)" -lt $end ] || break
done
cd /
rm -rf $work
echo "@SMP passed $passed, failed $failed, rounds $rounds, processors $cpus"
[ $failed = 0 ]
