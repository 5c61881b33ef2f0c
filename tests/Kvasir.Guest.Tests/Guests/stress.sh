#!/bin/sh
# stress.sh SECONDS WORKERS: pipelines and fork storms side by side, their results checked; prints "STRESS rounds R, wrong W".
seconds=$1
workers=$2
work=/tmp/stress
mkdir -p $work
cd $work || exit 1
seq 1 4000 >numbers
expected=$(md5sum <numbers)
end=$(($(cut -d . -f 1 /proc/uptime) + seconds))

worker() {
  rounds=0
  wrong=0
  while [ "$(cut -d . -f 1 /proc/uptime)" -lt $end ]; do
    sum=$(cat numbers | gzip -c | gunzip -c | cat | md5sum)
    [ "$sum" = "$expected" ] || { wrong=$((wrong + 1)); echo "WRONG worker $1 pipeline: $sum"; }
    count=0
    for i in 1 2 3 4 5 6 7 8; do
      /bin/busybox true && count=$((count + 1))
    done
    [ $count = 8 ] || { wrong=$((wrong + 1)); echo "WRONG worker $1 forks: $count"; }
    seen=$( (for i in 1 2 3 4; do (echo $i) & done; wait) | sort | tr -d '\n')
    [ "$seen" = 1234 ] || { wrong=$((wrong + 1)); echo "WRONG worker $1 background: $seen"; }
    usleep 1000
    rounds=$((rounds + 1))
  done
  echo "$rounds $wrong" >result.$1
}

n=0
while [ $n -lt "$workers" ]; do
  worker $n &
  n=$((n + 1))
done
wait
echo "STRESS $(awk '{ rounds += $1; wrong += $2 } END { printf "rounds %d, wrong %d, workers %d", rounds, wrong, NR }' result.*)"
cd /
rm -r $work
