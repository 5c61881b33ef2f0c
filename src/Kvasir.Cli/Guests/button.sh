#!/bin/sh
# Loads what the power button needs and waits for a press. Beside the session: the shell need not wait for two modules.
for module in button evdev; do
  file=/lib/modules/$module.ko
  [ -f $file.xz ] && unxz $file.xz
  [ -f $file ] && insmod $file
done
exec acpid -f -l /dev/null
