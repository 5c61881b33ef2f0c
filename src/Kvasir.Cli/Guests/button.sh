#!/bin/sh
# Loads what the power button needs and waits for a press. Beside the session: the shell need not wait for two modules.
for module in button evdev; do
  modprobe -q $module
done

# modprobe does not wait for a module that another one is loading, and acpid looks for devices when it starts only.
has_button() {
  for event in /sys/class/input/event*; do
    grep -qs 'Power Button' "$event/device/name" && [ -e "/dev/input/${event##*/}" ] && return 0
  done
  return 1
}
tries=100
until has_button || [ $tries -eq 0 ]; do
  sleep 0.1
  tries=$((tries - 1))
done
exec acpid -f -l /dev/null
