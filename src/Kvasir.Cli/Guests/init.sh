#!/bin/busybox sh
# The first process of the default guest: it makes the file system usable, runs a shell on the console and ends the machine with it.
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

# What poweroff, halt and reboot without -f ask of the first process.
trap 'sync; poweroff -f' USR2
trap 'sync; halt -f' USR1
trap 'sync; reboot -f' TERM

# The power button, in the background: the shell need not wait for two modules.
(
  for module in button evdev; do
    file=/lib/modules/$module.ko
    [ -f $file.xz ] && unxz $file.xz
    [ -f $file ] && insmod $file
  done
  acpid -f -l /dev/null
) </dev/null >/dev/null 2>&1 &

memory=$(awk '/^MemTotal/ { printf "%d", $2 / 1024 }' /proc/meminfo)
echo
echo "Linux $(uname -r) on $(uname -m), $(nproc) CPU(s), $memory MiB. 'exit' or 'poweroff' ends it."
cd /root
setsid cttyhack sh -l </dev/console >/dev/console 2>&1 &
shell=$!
# A signal ends the wait early; the shell may still be there then.
while kill -0 $shell 2>/dev/null; do
  wait $shell
done
sync
poweroff -f
# Reached where the machine has no way to switch itself off.
while :; do sleep 3600; done
