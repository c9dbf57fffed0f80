#!/usr/bin/env bash
# Every GPU test and benchmark, from an unpacked bundle: builds nothing, installs nothing; needs an NVIDIA driver.
# usage: linspec-VERSION-.../libexec/linspec-gpu-check/run_on_gpu.sh [FOLDER_FOR_LOGS] [quick]
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
logs=${1:-$(mktemp -d)} mode=${2:-all}
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

bench() {  # NAME FLAGS...: `linspec bench` on the GPU
  local name=$1
  shift
  run "$name" 120 "$root/bin/linspec" bench --device cuda --seconds 0.5 "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv | tee "$logs/gpu.csv"
run device_test 240 "$here/cuda_device_test"
run state_test 120 "$here/cuda_state_test"
run gemm_test 120 "$here/cuda_gemm_test"
run model_test 240 "$here/cuda_model_test" "$here/tiny" "$root/share/linspec/models" "$root/lib/liblinspec_cuda.so"
run draft_test 180 "$here/cuda_draft_test" "$here/tiny" "$root/share/linspec/models" "$root/lib/liblinspec_cuda.so"
run attention_test 240 "$here/cuda_attention_test"
run attention_bench 120 "$here/cuda_attention_bench"
run device_bench 180 "$here/cuda_device_bench"
bench bench_7b_bf16 --shape 7b --batch 1,8,32,64,128,256 --context 1024,32768,1048576 --prefill 2048,8192,32768,131072 \
  --max-step-tokens 4096
bench bench_7b_fp8 --shape 7b --weight-dtype fp8 --batch 1,8,32,64,128,256 --context 1024 --prefill 2048 \
  --max-step-tokens 4096
bench bench_bundled --batch 1,8,64,256 --context 1024 --prefill 2048 --max-step-tokens 4096
if [[ $mode == all ]] && command -v compute-sanitizer >/dev/null; then
  run memcheck 180 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_device_test" --quick
  run racecheck 180 compute-sanitizer --tool racecheck --error-exitcode 3 "$here/cuda_device_test" --quick
  run state_memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_state_test"
  run gemm_memcheck 180 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_gemm_test" --quick
  run gemm_racecheck 300 compute-sanitizer --tool racecheck --error-exitcode 3 "$here/cuda_gemm_test" --quick
  run draft_memcheck 180 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_draft_test" "$here/tiny" \
    "$root/share/linspec/models" "$root/lib/liblinspec_cuda.so" --quick
  run model_memcheck 180 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_model_test" "$here/tiny" \
    "$root/share/linspec/models" "$root/lib/liblinspec_cuda.so" --quick
  run attention_memcheck 300 compute-sanitizer --tool memcheck --error-exitcode 3 "$here/cuda_attention_test" --quick
  run attention_racecheck 300 compute-sanitizer --tool racecheck --error-exitcode 3 "$here/cuda_attention_test" --quick
fi
grep -h FAIL "$logs"/*_test.log | head -n 30
cat "$logs"/*_bench.log "$logs"/bench_*.log
printf '%s\n' "-- summary (logs in $logs)" "${summary[@]}"
exit $failed
