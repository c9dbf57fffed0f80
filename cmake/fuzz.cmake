# libFuzzer targets, one per tests/fuzz/*_fuzz.cc: cmake --preset fuzz, then build/fuzz/NAME_fuzz -max_total_time=60
# A seed corpus, where there is one, is tests/fuzz/NAME_corpus.
if(LINSPEC_FUZZ)
  # Coverage feedback needs the libraries instrumented too, not only the targets.
  target_compile_options(linspec_kernels PRIVATE -fsanitize=fuzzer-no-link)
  target_compile_options(linspec_models PRIVATE -fsanitize=fuzzer-no-link)
  file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/*_fuzz.cc)
  foreach(source ${fuzz_sources})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(${name} PRIVATE linspec_models -fsanitize=fuzzer)
  endforeach()
endif()
