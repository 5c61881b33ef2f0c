#!/bin/sh
# Runs a command on a host whose processor has virtualization, where this one has none: Debian's kernel with kvm_amd on QEMU's software CPU, which has AMD's SVM and nested
# page tables. The command sees this machine's files; what it writes is lost.
#
#   tests/images/nested-kvm.sh               boots the default guest there with each place of the interrupt controllers, and powers it off
#   tests/images/nested-kvm.sh 'COMMAND'     runs a shell command; $KVASIR is a kvasir for that processor. Its exit code is the script's
#
# Needs qemu-system-x86, busybox-static and cpio, downloads Debian's kernel package, and keeps it in the cache folder. The environment variables CPUS (2) and MEMORY
# (3G) say what the machine has.
set -eu
here=$(cd -- "$(dirname -- "$0")/../.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvasir/nested-kvm
mkdir -p "$cache"
cd "$cache"

command=${1:-'
for irqchip in off split on; do
    { while :; do echo poweroff; sleep 5; done; } | "$KVASIR" run --accel "kvm,kernel-irqchip=$irqchip" --log kvm >/tmp/out 2>/tmp/err || { cat /tmp/out /tmp/err; exit 1; }
    head -n 1 /tmp/err
    echo "kernel-irqchip=$irqchip: $(sed -n "s/^\(Linux .*MiB\)\. .exit.*/\1/p" /tmp/out), powered off"
done'}

# The kernel and the modules that /dev/kvm and this machine's files take.
if ! [ -e modules/done ]; then
    package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    echo "nested-kvm: downloading $package" >&2
    rm -rf package modules
    mkdir package modules
    (cd package && apt-get -q download "$package" >/dev/null && dpkg -x ./*.deb . && rm ./*.deb)
    add() {
        ! [ -e "modules/$1.ko" ] || return 0
        file=$(find package/lib/modules -name "$1.ko" -o -name "$(echo "$1" | tr _ -).ko" | head -n 1)
        [ -n "$file" ] || return 0
        for needed in $(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr ',-' ' _'); do
            (add "$needed")
        done
        cp "$file" "modules/$1.ko"
        echo "$1" >>modules/order
    }
    for module in virtio_pci 9pnet_virtio 9p kvm_amd overlay; do
        add "$module"
    done
    touch modules/done
fi
kernel=$(ls package/boot/vmlinuz-*)

# A program for an older processor than this one: the usual one is made for this one.
program=$cache/program
dotnet build "$here/src/Kvasir.Cli" -c Release -v quiet --nologo -o "$program" -p:RunAnalyzers=false >&2

rm -rf root
mkdir -p root/bin root/modules root/proc root/sys root/dev root/host root/upper
cp modules/* root/modules/
cp "$(command -v busybox)" root/bin/busybox
printf '%s\n' "$command" >root/command
cat >root/init <<INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs upper /upper
for module in \$(cat /modules/order); do
    insmod "/modules/\$module.ko"
done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
mkdir /upper/files /upper/work /upper/all
mount -t overlay -o lowerdir=/host,upperdir=/upper/files,workdir=/upper/work all /upper/all
cd /upper/all
mount -t proc proc proc
mount -t sysfs sys sys
mount --bind /dev dev
mkdir -p dev/shm dev/pts
mount -t tmpfs tmp dev/shm
mount -t devpts pts dev/pts
mount -t tmpfs tmp tmp
cp /command tmp/command
ip link set lo up
export KVASIR=$program/kvasir HOME=$HOME XDG_CACHE_HOME=${XDG_CACHE_HOME:-$HOME/.cache} DOTNET_ROOT=${DOTNET_ROOT:-$(dirname "$(readlink -f "$(command -v dotnet)")")} PATH=$PATH
chroot . /bin/sh -e /tmp/command </dev/null
echo "nested-kvm: ended with \$?"
exec /bin/busybox poweroff -f
INIT
chmod +x root/init
(cd root && find . | cpio -o -H newc 2>/dev/null | gzip -1) >initrd.gz

# SeaBIOS and the kernel say nothing that is wanted; the last line is the exit code.
mkfifo "$cache/console.$$"
trap 'rm -f "$cache/console.$$"' EXIT
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -machine q35 -smp "${CPUS:-2}" -m "${MEMORY:-3G}" -display none -no-reboot -kernel "$kernel" -initrd initrd.gz \
    -append "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off" -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
    -vga none -net none -serial stdio -monitor none </dev/null >"$cache/console.$$" &
code=1
while IFS= read -r line; do
    line=$(printf '%s' "$line" | tr -d '\r')
    case $line in
    *'nested-kvm: ended with '*) code=${line##* } ;;
    *) printf '%s\n' "$line" ;;
    esac
done <"$cache/console.$$"
wait
exit "$code"
