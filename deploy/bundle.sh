#!/usr/bin/env bash
# Packs a built tree into dist/linspec-VERSION-linux-x86_64.tar.xz and proves that it runs somewhere else.
# usage: deploy/bundle.sh BUILD_FOLDER     (./dev bundle calls it with build/release)
set -euo pipefail
build=$(realpath "${1:?usage: deploy/bundle.sh BUILD_FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$(sed -n 's/^project(linspec VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
name=linspec-$version-linux-$(uname -m)
stage=dist/$name
limit_kib=$((20 * 1024))

rm -rf "$stage" "dist/$name.tar.xz"
mkdir -p dist
cmake --install "$build" --prefix "$stage" --strip >"$build/install.log" ||
  { tail -n 20 "$build/install.log" >&2; exit 1; }

# The same tree gives the same bytes: sorted names, no owner, the commit's time. One dictionary over everything: the GPU's
# tests hold the plugin's kernels again. Unpacking needs its 128 MiB.
when=$(git log -1 --format=@%ct 2>/dev/null || echo @0)
pack() {
  tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="$when" -C dist -c "$@" | xz -T0 --lzma2=preset=6,dict=128MiB
}
without_weights_kib=$(($(pack --exclude='*.safetensors' "$name" | wc -c) / 1024))
pack "$name" >"dist/$name.tar.xz"
(cd dist && sha256sum "$name.tar.xz" >SHA256SUMS)

# Unpacked in another folder, with an empty environment: nothing may come from the build tree.
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
tar -xJf "dist/$name.tar.xz" -C "$elsewhere"
env -i "$elsewhere/$name/bin/linspec" version
strays=$(env -i /lib64/ld-linux-x86-64.so.2 --list "$elsewhere/$name/bin/linspec" | awk '$3 ~ /^\// {print $3}' |
  grep -v "^$elsewhere/" | grep -vE '/(libc|libm|libdl|librt|libpthread|libresolv)\.so' || true)
[[ -z $strays ]] || { printf 'bundle: libraries of this machine are still used:\n%s\n' "$strays" >&2; exit 1; }

rm -rf "$stage"
echo "dist/$name.tar.xz: $(du -k "dist/$name.tar.xz" | cut -f1) KiB, without weights $without_weights_kib KiB"
((without_weights_kib < limit_kib)) || { echo "bundle: more than $limit_kib KiB without weights" >&2; exit 1; }
