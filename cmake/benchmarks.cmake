# Google Benchmark programs. Not ctest tests: figures need a quiet machine. ninja -C build/cpu bench_ops && build/cpu/bench_ops
add_executable(bench_ops tests/kernels/bench_ops.cc)
target_link_libraries(bench_ops PRIVATE linspec_kernels benchmark::benchmark)
# The front door over an engine that costs nothing, beside Boost.Beast and gRPC alone: docs/reliability.md.
file(GLOB front_door_sources CONFIGURE_DEPENDS tests/front_door/*.cc)
add_executable(bench_front_door EXCLUDE_FROM_ALL ${front_door_sources})
target_link_libraries(bench_front_door PRIVATE linspec_server)
# What the load tester is measured against: build/cpu/loadtest_fake_server 100 (milliseconds between a stream's tokens)
add_executable(loadtest_fake_server EXCLUDE_FROM_ALL tests/loadtest/fake_server_main.cc)
target_link_libraries(loadtest_fake_server PRIVATE Threads::Threads)
add_executable(bench_metrics EXCLUDE_FROM_ALL tests/server/bench_metrics.cc)
target_link_libraries(bench_metrics PRIVATE linspec_server benchmark::benchmark)
add_executable(bench_engine EXCLUDE_FROM_ALL tests/scheduler/bench_engine.cc)
target_link_libraries(bench_engine PRIVATE linspec_scheduler benchmark::benchmark)
