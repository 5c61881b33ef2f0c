#!/bin/sh
# Brings the Ethernet interfaces up and asks for addresses: IPv4 by DHCP, IPv6 by itself.
for path in /sys/class/net/eth*; do
  [ -e "$path" ] || continue
  name=${path##*/}
  ifconfig "$name" up
  udhcpc -i "$name" -s /etc/lease -x hostname:kvasir -t 5 -T 2 -b -S
done
