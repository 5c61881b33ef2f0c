#!/bin/sh
# Makes the disk out of the packed system: debian-disk.sh ARCHIVE DISK SIZE. As root, or as the root of a user namespace.
set -eu
tree=$(mktemp -d ./tree.XXXXXX)
trap 'rm -rf "$tree"' EXIT
tar --extract --file "$1" --directory "$tree" --numeric-owner --preserve-permissions --exclude './dev/*'
chmod 755 "$tree"
truncate -s "$3" "$2"
mke2fs -q -t ext4 -F -L kvasir-root -m 1 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard -d "$tree" "$2"
cp "$tree"/boot/vmlinuz-* vmlinuz
cp "$tree"/boot/initrd.img-* initrd.gz
chroot "$tree" dpkg-query -W -f '${Package} ${Version}\n' >packages.txt
chmod 644 vmlinuz initrd.gz packages.txt
