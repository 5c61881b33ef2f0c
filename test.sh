#!/bin/sh
# Builds everything and runs every test project under tests/. The last line is "N passed, N failed, N skipped"; the exit code is 0 when
# nothing failed. A test that needs what this host lacks counts as skipped, and its reason is shown.
#
#   ./test.sh             all projects
#   ./test.sh Boot Cli    those whose names contain one of the words
set -u
cd -- "$(dirname -- "$0")" || exit 1

limit=${TEST_TIME_LIMIT:-1800}
logs=artifacts/test
passed=0
failed=0
skipped=0

failures=

finish() {
  [ -z "$failures" ] || { echo "failed:"; printf '%s' "$failures"; }
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" -eq 0 ] && exit 0
  exit 1
}

# Tools that some tests compare against; without them those tests are skipped.
missing=
for tool in iasl:acpica-tools nasm:nasm dmidecode:dmidecode python3:python3 gcc:gcc openssl:openssl qemu-img:qemu-utils nbdkit:nbdkit nbdinfo:libnbd-bin lz4:lz4; do
  command -v "${tool%%:*}" >/dev/null || missing="$missing ${tool##*:}"
done
for tool in tshark:tshark mmdebstrap:mmdebstrap fio:fio iperf3:iperf3 grub-mkimage:grub-common mke2fs:e2fsprogs ganesha.nfsd:nfs-ganesha tgtd:tgt; do
  command -v "${tool%%:*}" >/dev/null || missing="$missing ${tool##*:}"
done
for library in libslirp.so.0:libslirp0 libnfs.so.13:libnfs13 libiscsi.so.7:libiscsi7 libfsalvfs.so:nfs-ganesha-vfs; do
  [ -n "$(find /usr/lib /lib -name "${library%%:*}" -print -quit 2>/dev/null)" ] || missing="$missing ${library##*:}"
done
for file in grub-pc-bin:/usr/lib/grub/i386-pc/boot.img seabios:/usr/share/seabios/bios-256k.bin ovmf:/usr/share/OVMF/OVMF_CODE.fd; do
  [ -e "${file#*:}" ] || missing="$missing ${file%%:*}"
done
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing$missing"
  export DEBIAN_FRONTEND=noninteractive
  # Servers come with some of them, which only the tests start: nothing runs because it was installed.
  policy=
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    policy=/usr/sbin/policy-rc.d
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
  fi
  install() { apt-get install -y -q "$@" </dev/null >/dev/null 2>&1; }
  # shellcheck disable=SC2086
  install $missing || { apt-get update -q </dev/null >/dev/null 2>&1 && install $missing; } ||
    for package in $missing; do
      install "$package" || echo "cannot install $package: the tests that need it are skipped"
    done
  [ -z "$policy" ] || rm -f "$policy"
  trap - EXIT
fi

mkdir -p "$logs"
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1 MSBUILDDISABLENODEREUSE=1 DOTNET_CLI_USE_MSBUILD_SERVER=0
command -v dotnet >/dev/null || { echo "the .NET 10 SDK is missing: install the package dotnet-sdk-10.0"; failed=1; finish; }

echo "building"
if ! dotnet build Kvasir.slnx -c Release -v quiet --nologo -nodeReuse:false -p:UseSharedCompilation=false </dev/null >"$logs/build.log" 2>&1; then
  cat "$logs/build.log"
  echo "the build failed"
  failed=1
  finish
fi

chosen() {
  [ $# -gt 1 ] || return 0
  name=$1
  shift
  for word in "$@"; do
    case $name in
      *"$word"*) return 0 ;;
    esac
  done
  return 1
}

# A number from the runner's summary line, "Total: 15, Errors: 0, Failed: 0, Skipped: 0, ...".
count() { printf '%s' "$2" | sed -n "s/.*$1: \([0-9][0-9]*\).*/\1/p"; }

# These tests run the command itself: its build does not count towards their time.
if [ -z "${KVASIR:-}" ] && { chosen Kvasir.Guest.Tests "$@" || chosen Kvasir.Block.Tests "$@"; } && ! ./kvasir --version </dev/null >"$logs/kvasir.log" 2>&1; then
  cat "$logs/kvasir.log"
  echo "the command's build failed"
  failed=1
  finish
fi

for project in tests/*/*.Tests.csproj; do
  [ -e "$project" ] || continue
  name=$(basename "$project" .csproj)
  chosen "$name" "$@" || continue
  program=$(dirname "$project")/bin/Release/net10.0/$name
  log=$logs/$name.log
  printf '%s ... ' "$name"
  timeout -k 10 "$limit" "$program" -noColor </dev/null >"$log" 2>&1
  code=$?
  summary=$(grep 'Total: [0-9]*, Errors:' "$log" | tail -n 1)
  if [ -z "$summary" ]; then
    failed=$((failed + 1))
    [ "$code" = 124 ] && echo "did not end within $limit s" || echo "ended with code $code before its summary"
    tail -n 40 "$log"
    continue
  fi
  total=$(count Total "$summary")
  bad=$(($(count Failed "$summary") + $(count Errors "$summary")))
  left=$(($(count Skipped "$summary") + $(count "Not Run" "$summary")))
  [ "$code" -ne 0 ] && [ "$bad" -eq 0 ] && bad=1 && total=$((total + 1))
  passed=$((passed + total - bad - left))
  failed=$((failed + bad))
  skipped=$((skipped + left))
  echo "$((total - bad - left)) passed, $bad failed, $left skipped"
  if [ "$bad" -gt 0 ]; then
    grep -v '^ *Discover\|^ *Start' "$log" | awk '/\[SKIP\]/ { skip = 2 } skip-- > 0 { next } { print }' | tail -n 400
    # With the first lines of each message: the end of a long output is what is read first.
    failures="$failures$(grep -A 6 '\[FAIL\]' "$log" | cut -c 1-300)
"
  elif [ "$left" -gt 0 ]; then
    grep -A 1 '\[SKIP\]' "$log"
  fi
done
finish
