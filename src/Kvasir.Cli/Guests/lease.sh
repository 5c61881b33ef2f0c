#!/bin/sh
# Called by busybox's udhcpc with what it got.
case $1 in
  bound | renew)
    ifconfig "$interface" "$ip" netmask "$subnet"
    while route del default dev "$interface" 2>/dev/null; do :; done
    for gateway in $router; do route add default gw "$gateway" dev "$interface"; done
    : >/etc/resolv.conf
    [ -n "$domain" ] && echo "search $domain" >>/etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
    ;;
  deconfig)
    ifconfig "$interface" 0.0.0.0
    ;;
esac
