#!/bin/sh
# Loads what the power button needs and waits for a press. Beside the session: the shell need not wait for two modules.
for module in button evdev; do
  modprobe -q $module
done
exec acpid -f -l /dev/null
