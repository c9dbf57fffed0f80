#!/usr/bin/env bash
# Every device test and benchmark from the binaries beside it: builds nothing, installs nothing; needs an NVIDIA driver.
# usage: run_on_gpu.sh [FOLDER_OF_BINARIES] [FOLDER_FOR_LOGS]
set -uo pipefail
binaries=$(realpath "${1:-$(dirname "${BASH_SOURCE[0]}")}")
logs=${2:-${OUT:-$(mktemp -d)}}
mkdir -p "$logs"
failed=0 summary=()

run() {  # NAME TIME_LIMIT COMMAND...
  local name=$1 limit=$2 rc
  shift 2
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1
  rc=$?
  summary+=("$(printf '%-22s exit %3d  %s' "$name" "$rc" "$(tail -n 1 "$logs/$name.log")")")
  ((rc == 0)) || failed=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv | tee "$logs/gpu.csv"
run device_test 240 "$binaries/cuda_device_test"
run attention_test 120 "$binaries/cuda_attention_test"
run device_bench 180 "$binaries/cuda_device_bench"
run attention_bench 120 "$binaries/cuda_attention_bench"
if command -v compute-sanitizer >/dev/null; then
  run memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 3 "$binaries/cuda_device_test" --quick
  run attention_memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 3 "$binaries/cuda_attention_test" --quick
  run attention_racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 3 "$binaries/cuda_attention_test" --quick
  run racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 3 "$binaries/cuda_device_test" --quick
fi
grep -h FAIL "$logs/device_test.log" "$logs/attention_test.log" | head -n 30
cat "$logs/device_bench.log" "$logs/attention_bench.log"
printf '%s\n' "-- summary (logs in $logs)" "${summary[@]}"
exit $failed
