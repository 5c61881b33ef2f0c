#!/bin/sh
# A login shell on the console, and the machine ends with it.
memory=$(awk '/^MemTotal/ { printf "%d", $2 / 1024 }' /proc/meminfo)
echo
echo "Linux $(uname -r) on $(uname -m), $(nproc) CPU(s), $memory MiB. 'exit' or 'poweroff' ends it."
cd /root
setsid cttyhack sh -l
sync
poweroff -f
# Reached where the machine has no way to switch itself off.
while :; do sleep 3600; done
