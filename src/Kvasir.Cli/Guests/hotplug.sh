#!/bin/sh
# Called by busybox's uevent for each event of the kernel's: loads the driver of a device that appeared.
[ "$ACTION" = add ] && [ -n "$MODALIAS" ] && exec modprobe -q "$MODALIAS"
exit 0
