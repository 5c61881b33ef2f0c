#!/bin/busybox sh
# The guest's first process: mounts, then waits for work on the console.
busybox mkdir -p /proc /sys /dev /tmp /run
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev 2>/dev/null
busybox mkdir -p /dev/shm /dev/pts
busybox mount -t devpts devpts /dev/pts
busybox mount -t tmpfs shm /dev/shm
busybox mount -t tmpfs tmp /tmp
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox stty -echo -onlcr
busybox setsid busybox sh -c 'exec sh /bench/agent.sh </dev/ttyS0 >/dev/ttyS0 2>&1'
busybox poweroff -f
