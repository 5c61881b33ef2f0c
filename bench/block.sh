#!/bin/sh
# The image tool and the block layer against qemu-img, measured in turn in one run.
#
#   bench/block.sh                  all cases
#   bench/block.sh convert bench    those whose names contain one of the words
#
# BLOCK_ROUNDS (default 5) runs of each side, the least time of each counts; BLOCK_MIB (default 1024) is the size of the disk converted;
# BLOCK_FOLDER (default: artifacts/bench/block) is where the images lie.
set -u
cd -- "$(dirname -- "$0")/.." || exit 1
command -v qemu-img >/dev/null || { echo "qemu-img is missing: install the package qemu-utils"; exit 1; }
command -v python3 >/dev/null || { echo "python3 is missing"; exit 1; }
[ -n "${KVASIR:-}" ] || ./kvasir --version >/dev/null || exit 1
exec python3 bench/block/compare.py ./kvasir "$@"
