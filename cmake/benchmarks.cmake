# Google Benchmark programs. Not ctest tests: figures need a quiet machine. ninja -C build/cpu bench_ops && build/cpu/bench_ops
add_executable(bench_ops tests/kernels/bench_ops.cc)
target_link_libraries(bench_ops PRIVATE linspec_kernels benchmark::benchmark)
# The front door over an engine that costs nothing, beside Boost.Beast and gRPC alone: docs/reliability.md.
file(GLOB front_door_sources CONFIGURE_DEPENDS tests/front_door/*.cc)
add_executable(bench_front_door ${front_door_sources})
target_link_libraries(bench_front_door PRIVATE linspec_server)
