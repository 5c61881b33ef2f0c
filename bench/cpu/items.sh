# Runs one load by its name (and, with smp, for how many seconds), in the guest or in a chroot of the same files. What load prints around the measured time goes to standard output;
# results are checked after it, outside the measured time.
name=$1
load=/bench/load
data=/bench/data
work=/tmp/work
mkdir -p $work

timed() { $load time "$name" "$@"; }
sum() { echo "@SUM $name $(md5sum | cut -c 1-16)"; }

# openssl measures for a second and tells how much it did: what a fixed amount would have taken is the result, and the processor time of the
# whole run is scaled to it.
#   speed CLASS AMOUNT UNIT ARGUMENT...   e.g. +R:12345:aes-128-cbc:1.000000 (count and seconds)
speed() {
  mark=$1 amount=$2 unit=$3
  shift 3
  timed sh -c 'exec openssl speed -mr -elapsed -seconds 1 "$@" >/tmp/work/speed 2>&1' speed "$@" || return 1
  awk -F : -v mark="$mark" -v amount="$amount" -v unit="$unit" -v name="$name" '
    /^\+R/ && $1 != mark { others += $NF }
    $1 == mark && mark == "+R" { printf "@RATE %s %.6f %.9f\n", name, amount / ($2 * unit) * $NF, amount / ($2 * unit) }
    $1 == mark && mark == "+R1" { count = $2; seconds = $4; others -= 0 }
    END { if (mark == "+R1") printf "@RATE %s %.6f %.9f\n", name, amount / count * seconds, amount / count * seconds / (seconds + others) }
  ' $work/speed
}

case $name in
  gzip)
    timed sh -c "gzip -n -6 -c $data >$work/gz" && { cat $work/gz; gzip -dc $work/gz; } | sum
    ;;
  sha256sum)
    timed sh -c "cat $data $data $data $data $data $data $data $data | sha256sum >$work/sum" && sum <$work/sum
    ;;
  7z)
    rm -f $work/a.7z
    timed sh -c "7z a -mx3 -mmt1 -mtm- -bso0 -bsp0 $work/a.7z $data" && { stat -c %s $work/a.7z; 7z x -so $work/a.7z; } | sum
    ;;
  python)
    timed sh -c "python3.11 -S -E /bench/load.py >$work/python" && sum <$work/python
    ;;
  sysbench)
    timed sh -c "sysbench cpu --threads=1 --cpu-max-prime=10000 --events=500 --time=0 run >$work/sysbench" &&
      grep 'total number of events' $work/sysbench | sum
    ;;
  matrixprod)
    timed sh -c "cd $work && stress-ng --cpu 1 --cpu-method matrixprod --cpu-ops 60 --verify --metrics-brief >$work/matrixprod 2>&1" &&
      grep -c 'successful run completed' $work/matrixprod | sum
    ;;
  aes-128-cbc)
    speed +R 268435456 16384 -bytes 16384 -evp aes-128-cbc &&
      openssl enc -aes-128-cbc -K 000102030405060708090a0b0c0d0e0f -iv 0f0e0d0c0b0a09080706050403020100 -in $data | sum
    ;;
  sha-256)
    speed +R 268435456 16384 -bytes 16384 -evp sha256 && openssl dgst -sha256 -r $data | sum
    ;;
  rsa-2048)
    speed +R1 256 1 rsa2048 && openssl dgst -sha256 -sign /bench/key.pem $data | sum
    ;;
  sqlite)
    rm -f $work/db
    timed sh -c "sqlite3 $work/db </bench/load.sql >$work/sqlite" && sum <$work/sqlite
    ;;
  fork+exec)
    timed sh -c 'i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i + 1)); done' && echo 300 | sum
    ;;
  dd-zero-null)
    timed dd if=/dev/zero of=/dev/null bs=1M count=3000 status=none && echo 3000 | sum
    ;;
  dd-pipe)
    timed sh -c "dd if=/dev/zero bs=4k count=60000 status=none | cat | wc -c >$work/pipe" && sum <$work/pipe
    ;;
  find)
    [ -d /tmp/tree ] || $load tree /tmp/tree || exit 1
    timed sh -c "for i in 1 2 3 4 5 6 7 8; do find /tmp/tree -name '*7.c' -size -1; done >$work/find" && sort $work/find | sum
    ;;
  smp)
    sh /bench/smp.sh "$2"
    ;;
  dmesg)
    busybox dmesg
    ;;
  *)
    $load "$name"
    ;;
esac
code=$?
echo "@DONE $name $code"
