# Google Benchmark programs. Not ctest tests: figures need a quiet machine. ninja -C build/cpu bench_ops && build/cpu/bench_ops
add_executable(bench_ops tests/kernels/bench_ops.cc)
target_link_libraries(bench_ops PRIVATE linspec_kernels benchmark::benchmark)
