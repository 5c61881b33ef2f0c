#!/bin/sh
# What virtio-net's device side carries in frames, driven by a synthetic driver on the same one thread: bench/net.sh [SECONDS for each line]
set -eu
cd -- "$(dirname -- "$0")/.."
export DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_NOLOGO=1 MSBUILDDISABLENODEREUSE=1 DOTNET_CLI_USE_MSBUILD_SERVER=0
dotnet build bench/Kvasir.Network.Bench -c Release -v quiet --nologo -nodeReuse:false -p:UseSharedCompilation=false </dev/null >&2
exec bench/Kvasir.Network.Bench/bin/Release/net10.0/Kvasir.Network.Bench "$@"
