#!/bin/sh
# Loads the drivers of the devices that are there at the start, before the shell comes. A driver may bring out further devices, on buses that come later.
cd "/lib/modules/$(uname -r)" 2>/dev/null || exit 0
for module in *.ko.xz; do
  [ -f "$module" ] && unxz *.ko.xz && depmod && break
done
load() {
  for file in /sys/bus/$1/devices/*/modalias; do
    [ -f "$file" ] && read -r alias < "$file" || continue
    case "$alias" in $2) modprobe -q "$alias" ;; esac
  done
}
load pci 'pci:v00001AF4*'
load acpi 'acpi:LNRO0005*'
load platform 'acpi:LNRO0005*'
load virtio 'virtio:*'
load scsi 'scsi:*'
