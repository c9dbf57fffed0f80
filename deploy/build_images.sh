#!/usr/bin/env bash
# Builds the container images, starts each one the way the manifests do (no root, no capabilities, read-only root file
# system), and prints its size and the time from start to ready.
#
# usage: deploy/build_images.sh [--tool docker|podman|buildah] [--local-base] [cpu] [cuda]      (default: cpu)
#
# --tool        default: the first of docker, podman, buildah that works here. buildah needs no daemon and no kernel
#               features beyond chroot; it must run as root.
# --local-base  no registry is reachable: make debian:bookworm-slim with debootstrap, and for cuda a stand-in for NVIDIA's
#               development image from /usr/local/cuda. The Dockerfiles stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'build_images: %s\n' "$*" >&2; exit 1; }

tool="" local_base=false images=()
while (($#)); do
  case $1 in
    --tool) tool=${2:?"--tool needs docker, podman or buildah"}; shift 2 ;;
    --local-base) local_base=true; shift ;;
    cpu | cuda) images+=("$1"); shift ;;
    *) die "unknown argument $1; see the head of this file" ;;
  esac
done
((${#images[@]})) || images=(cpu)
if [[ -z $tool ]]; then
  for candidate in docker podman buildah; do
    "$candidate" info >/dev/null 2>&1 && { tool=$candidate; break; }
  done
fi
[[ -n $tool ]] || die "none of docker, podman, buildah works here; apt-get install buildah"

scratch=$(mktemp -d)
container=""
cleanup() {
  [[ -z $container ]] || "$tool" rm -f "$container" >/dev/null 2>&1 || true
  rm -rf "$scratch"
}
trap cleanup EXIT

build() {  # build TAG DOCKERFILE CONTEXT
  if [[ $tool == buildah ]]; then
    # Docker's format: the OCI one has no health check. chroot isolation works inside other containers.
    buildah bud --format docker --isolation chroot --layers --pull-never="$local_base" -t "$1" -f "$2" "$3"
  else
    "$tool" build -t "$1" -f "$2" "$3"
  fi
}

have_image() { "$tool" inspect --type image "$1" >/dev/null 2>&1 || "$tool" image inspect "$1" >/dev/null 2>&1; }

# A root file system as an image under somebody else's name.
import_folder() {  # import_folder FOLDER TAG
  tar -C "$1" -cf "$scratch/root.tar" .
  printf 'FROM scratch\nADD root.tar /\n' >"$scratch/Dockerfile"
  build "$2" "$scratch/Dockerfile" "$scratch"
  rm "$scratch/root.tar"
}

make_local_bases() {
  local base=docker.io/library/debian:bookworm-slim
  if ! have_image "$base"; then
    command -v debootstrap >/dev/null || die "--local-base needs debootstrap: apt-get install debootstrap"
    debootstrap --variant=minbase --include=ca-certificates bookworm "$scratch/minbase" >"$scratch/debootstrap.log" ||
      { tail -n 20 "$scratch/debootstrap.log" >&2; die "debootstrap failed"; }
    rm -rf "$scratch"/minbase/var/cache/apt/archives/*.deb "$scratch"/minbase/var/lib/apt/lists/*
    import_folder "$scratch/minbase" "$base"
    rm -rf "$scratch/minbase"
  fi
  [[ " ${images[*]} " == *" cuda "* ]] || return 0
  local toolkit
  toolkit=docker.io/$(sed -n 's/^ARG CUDA_IMAGE=//p' deploy/Dockerfile.cuda)
  have_image "$toolkit" && return 0
  [[ -x /usr/local/cuda/bin/nvcc ]] || die "--local-base cuda needs a CUDA toolkit in /usr/local/cuda"
  # What compiling and linking the static runtime takes, not the gigabytes of libraries beside it.
  mkdir -p "$scratch/toolkit/usr/local/cuda"
  tar -C /usr/local/cuda/ --exclude='*.so.[0-9]*' -cf - . | tar -C "$scratch/toolkit/usr/local/cuda" -xf -
  cp -a /usr/local/cuda/lib64/libcudart.so* "$scratch/toolkit/usr/local/cuda/lib64/"
  import_folder "$scratch/toolkit" "$toolkit"
  rm -rf "$scratch/toolkit"
}

free_port() { /usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
milliseconds() { date +%s%3N; }

# Starts TAG as the manifests do and prints how long it took until /ready said 200.
time_to_ready() {  # time_to_ready TAG
  local http grpc start server=0 flags
  http=$(free_port)
  grpc=$(free_port)
  flags=(serve --host 127.0.0.1 --http-port "$http" --grpc-port "$grpc" --log-format json)
  local log=$scratch/server.log
  if [[ $tool == buildah ]]; then
    command -v bwrap >/dev/null || die "running an image without a daemon needs bubblewrap: apt-get install bubblewrap"
    container=$(buildah from --pull-never "$1")
    local root
    root=$(buildah mount "$container")
    start=$(milliseconds)
    bwrap --ro-bind "$root" / --proc /proc --dev /dev --unshare-user --uid 10001 --gid 10001 --cap-drop ALL --new-session \
      --die-with-parent --clearenv --setenv PATH /usr/bin:/bin /opt/linspec/bin/linspec "${flags[@]}" >"$log" 2>&1 &
    server=$!
  else
    start=$(milliseconds)
    container=$("$tool" run -d --read-only --cap-drop ALL --security-opt no-new-privileges --network host "$1" "${flags[@]}")
  fi
  until curl -sf "http://127.0.0.1:$http/ready" >/dev/null; do
    (($(milliseconds) - start < 120000)) || { tail -n 20 "$log" >&2; die "$1 is not ready after two minutes"; }
    if ((server)) && ! kill -0 "$server" 2>/dev/null; then cat "$log" >&2; die "$1 exited"; fi
    sleep 0.02
  done
  local ready=$(($(milliseconds) - start))
  curl -sf "http://127.0.0.1:$http/v1/completions" -H 'Content-Type: application/json' \
    -d '{"prompt": "Once upon a time", "max_tokens": 8}' | grep -q '"finish_reason"' || die "$1 does not generate"
  if ((server)); then
    local child
    child=$(pgrep -P "$server" -f /opt/linspec/bin/linspec || true)
    kill -TERM "${child:-$server}"
    wait "$server" || die "$1 did not end well on SIGTERM: exit status $?"
    buildah umount "$container" >/dev/null
  else
    "$tool" stop "$container" >/dev/null
  fi
  "$tool" rm "$container" >/dev/null
  container=""
  echo "$1: $ready ms from start to ready"
}

size_of() {  # size_of TAG -> uncompressed
  if [[ $tool == buildah ]]; then
    buildah images --json "$1" | sed -n 's/.*"size": "\(.*\)".*/\1/p' | head -n 1
  else
    "$tool" image inspect --format '{{.Size}} bytes' "$1"
  fi
}

[[ $local_base == false ]] || make_local_bases
for image in "${images[@]}"; do
  suffix=""
  [[ $image == cpu ]] || suffix=.$image
  build "linspec:$image" "deploy/Dockerfile$suffix" .
  echo "linspec:$image: $(size_of "linspec:$image")"
  time_to_ready "linspec:$image"
done
