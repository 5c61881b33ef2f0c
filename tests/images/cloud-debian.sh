#!/bin/sh
# Makes a Debian 12 disk like the distribution's cloud images: an MBR, one partition, GRUB put there by grub-install, cloud-init; nothing of Kvasir's in it.
#
#   tests/images/cloud-debian.sh DISK        writes DISK (raw, 3 GiB, sparse)
#
# Needs mmdebstrap and e2fsprogs, and no root where user namespaces and subordinate ids are there. GRUB is installed by the system itself, in its first run under
# kvasir. The environment variable KVASIR names another kvasir program.
set -eu
disk=$(realpath -m -- "${1:?usage: cloud-debian.sh DISK}")
here=$(cd -- "$(dirname -- "$0")/../.." && pwd)
kvasir=${KVASIR:-$here/kvasir}
PATH=$PATH:/usr/sbin:/sbin
work=$(mktemp -d "${TMPDIR:-/var/tmp}/cloud-debian.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

# The partition begins at 1 MiB, as partitioning tools have it: GRUB's core lies in the gap before.
gap=1
size=3071

cat >setup.sh <<'END'
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
cat >/etc/default/grub <<'GRUB'
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX="console=ttyS0"
GRUB_TERMINAL="serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB
echo 'LABEL=cloudimg / ext4 rw,errors=remount-ro,x-systemd.growfs 0 1' >/etc/fstab
echo localhost >/etc/hostname
: >/etc/machine-id
systemctl enable systemd-networkd systemd-resolved >/dev/null 2>&1
cat >/root/install-grub <<'INIT'
#!/bin/sh
mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mount -o remount,rw /
udevd=/lib/systemd/systemd-udevd
$udevd --daemon && udevadm trigger && udevadm settle
grub-install /dev/vda && update-grub && rm /root/install-grub && echo installed >/root/done
sync
mount -o remount,ro /
echo o >/proc/sysrq-trigger
# The disk goes first: nothing can be loaded from it any more.
while :; do :; done
INIT
chmod 755 /root/install-grub
END

cat >disk.sh <<'END'
set -eu
mkdir tree
tar --extract --file root.tar --directory tree --numeric-owner --preserve-permissions --exclude './dev/*'
truncate -s "${1}M" part
mke2fs -q -t ext4 -F -L cloudimg -E nodiscard -d tree part
cp tree/boot/vmlinuz-* vmlinuz
cp tree/boot/initrd.img-* initrd
chmod 644 vmlinuz initrd part
rm -rf tree
END

mmdebstrap --mode=auto --variant=minbase --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --include=systemd-sysv,udev,dbus,systemd-resolved,openssh-server,linux-image-cloud-amd64,initramfs-tools,grub-pc,cloud-init,cloud-guest-utils,sudo,iproute2,netplan.io,e2fsprogs,ca-certificates,locales \
  --customize-hook='upload setup.sh /root/setup.sh' --customize-hook='chroot "$1" sh /root/setup.sh' --customize-hook='rm "$1/root/setup.sh"' --format=tar bookworm root.tar
if [ "$(id -u)" = 0 ]; then
  sh disk.sh $size
else
  unshare --map-auto --map-root-user -- sh disk.sh $size
fi
rm root.tar
# A table of one partition, type 83h, active, and no boot code yet.
truncate -s "$((gap + size))M" new.raw
printf '\200\040\041\000\203\376\377\377' | dd of=new.raw bs=1 seek=446 conv=notrunc status=none
le32() { printf "\\$(printf %o $(($1 & 255)))\\$(printf %o $(($1 >> 8 & 255)))\\$(printf %o $(($1 >> 16 & 255)))\\$(printf %o $(($1 >> 24 & 255)))"; }
le32 $((gap * 2048)) | dd of=new.raw bs=1 seek=454 conv=notrunc status=none
le32 $((size * 2048)) | dd of=new.raw bs=1 seek=458 conv=notrunc status=none
printf '\125\252' | dd of=new.raw bs=1 seek=510 conv=notrunc status=none
dd if=part of=new.raw bs=1M seek=$gap conv=notrunc,sparse status=none
rm part
echo "installing GRUB, in the system itself"
timeout 600 "$kvasir" run --name "cloud-debian-$$" --net none --disk "$work/new.raw,format=raw" --kernel vmlinuz --initrd initrd --memory 1G \
  --append 'root=LABEL=cloudimg console=ttyS0 init=/root/install-grub panic=-1' </dev/null >console.log 2>&1 || { cat console.log >&2; exit 1; }
grep -q 'Installation finished. No error reported.' console.log || { cat console.log >&2; exit 1; }
mv new.raw "$disk"
