#!/bin/sh
# Runs once inside the new system, as its root: makes a server out of the bare packages that starts fast and takes its identity from a seed disk.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

useradd -m -s /bin/bash -G sudo,adm,systemd-journal debian
echo debian:debian | chpasswd
echo 'debian ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/90-kvasir
chmod 440 /etc/sudoers.d/90-kvasir
echo debian >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost ip6-loopback\n' >/etc/hosts
echo '/dev/vda / ext4 rw,relatime,x-systemd.growfs 0 0' >/etc/fstab
printf 'Debian GNU/Linux \\n \\l\n\nThe first user is debian, the password debian; over the network only a key opens the door.\n\n' >/etc/issue

cat >/etc/systemd/network/80-ethernet.network <<'END'
[Match]
Name=en* eth*

[Network]
DHCP=yes
IPv6AcceptRA=yes
END

# File capabilities do not pass a user namespace: ping works by the kernel's own leave instead.
echo 'net.ipv4.ping_group_range = 0 2147483647' >/etc/sysctl.d/60-ping.conf

mkdir -p /etc/ssh/sshd_config.d /usr/lib/kvasir
printf 'PasswordAuthentication no\nUseDNS no\n' >/etc/ssh/sshd_config.d/kvasir.conf
rm -f /etc/ssh/ssh_host_*

cat >/etc/systemd/system/kvasir-hostkey.service <<'END'
[Unit]
Description=Make this machine's SSH host key
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key

[Install]
WantedBy=multi-user.target
END

cat >/usr/lib/kvasir/seed <<'END'
#!/bin/sh
# Applies a NoCloud seed disk: host name, SSH keys, and user data that is a script. Each instance-id once.
set -u
at=/run/kvasir-seed
mkdir -p "$at" /var/lib/kvasir
mount -o ro /dev/disk/by-label/cidata "$at" || exit 1
trap 'umount "$at"' EXIT
id=$(sed -n 's/^instance-id: *//p' "$at/meta-data")
[ "$id" = "$(cat /var/lib/kvasir/instance-id 2>/dev/null)" ] && exit 0
name=$(sed -n 's/^local-hostname: *//p' "$at/meta-data")
if [ -n "$name" ]; then
  echo "$name" >/etc/hostname
  hostname "$name"
  sed -i "s/^127\.0\.1\.1 .*/127.0.1.1 $name/" /etc/hosts
fi
install -d -m 700 -o debian -g debian /home/debian/.ssh
sed -n 's/^ *- *\(ssh-[^ ]* .*\|ecdsa-[^ ]* .*\|sk-[^ ]* .*\)$/\1/p' "$at/meta-data" >/home/debian/.ssh/authorized_keys
chown debian:debian /home/debian/.ssh/authorized_keys
chmod 600 /home/debian/.ssh/authorized_keys
echo "$id" >/var/lib/kvasir/instance-id
case $(head -c 2 "$at/user-data" 2>/dev/null) in
  '#!')
    install -m 700 "$at/user-data" /var/lib/kvasir/user-data
    /var/lib/kvasir/user-data
    ;;
  *)
    grep -q '[^[:space:]]' "$at/user-data" 2>/dev/null && echo 'user data that is no script needs the package cloud-init' >&2
    ;;
esac
exit 0
END
chmod 755 /usr/lib/kvasir/seed

cat >/etc/systemd/system/kvasir-seed.service <<'END'
[Unit]
Description=Take the identity that the seed disk gives

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/kvasir/seed
END
# The disk brings its service along; without one nothing waits.
echo 'SUBSYSTEM=="block", ENV{ID_FS_LABEL}=="cidata", TAG+="systemd", ENV{SYSTEMD_WANTS}+="kvasir-seed.service"' >/etc/udev/rules.d/80-kvasir-seed.rules

systemctl enable systemd-networkd systemd-resolved ssh kvasir-hostkey serial-getty@ttyS0 >/dev/null 2>&1
systemctl disable systemd-networkd-wait-online >/dev/null 2>&1 || true
systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer \
  getty@tty1.service systemd-firstboot.service >/dev/null 2>&1
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf

# The initial file system holds what finds the root disk, and no more.
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=gzip/' /etc/initramfs-tools/initramfs.conf
printf '%s\n' virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod >>/etc/initramfs-tools/modules
update-initramfs -u -k all >/dev/null
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/*.log
