#!/bin/busybox sh
# The first process of the default guest: makes the file system usable, then becomes busybox's init, which runs what /etc/inittab says.
export PATH=/sbin:/usr/sbin:/bin:/usr/bin HOME=/root USER=root LOGNAME=root SHELL=/bin/sh TERM="${TERM:-linux}"
/bin/busybox mount -t devtmpfs -o mode=0755,nosuid dev /dev
/bin/busybox mount -t proc -o nosuid,nodev,noexec proc /proc
/bin/busybox mount -t sysfs -o nosuid,nodev,noexec sys /sys
/bin/busybox --install -s
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=0620,gid=5 pts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=1777 shm /dev/shm
hostname kvasir
ifconfig lo 127.0.0.1 up
/etc/drivers
exec /sbin/init
