# Fuzz targets, one per tests/fuzz/*_fuzz.cc. Everywhere: NAME_fuzz_replay runs as a test what is in tests/fuzz/corpus: the
# folder NAME_fuzz, written by hand, and NAME_fuzz of found.tar.xz, the shortest inputs that reach most of what fuzzing has
# reached. With the preset fuzz also libFuzzer programs: ./dev fuzz NAME SECONDS.
set(found_corpus ${CMAKE_BINARY_DIR}/test_data/fuzz)
file(ARCHIVE_EXTRACT INPUT ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/found.tar.xz DESTINATION ${found_corpus})
file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/*_fuzz.cc)
foreach(source ${fuzz_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name}_replay ${source} tests/fuzz/replay_main.cc)
  target_link_libraries(${name}_replay PRIVATE linspec_server)
  add_test(NAME FuzzCorpus.${name} COMMAND ${name}_replay ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${name}
    ${found_corpus}/${name})
  if(LINSPEC_FUZZ)
    add_executable(${name} ${source})
    target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(${name} PRIVATE linspec_server -fsanitize=fuzzer)
  endif()
endforeach()
if(LINSPEC_FUZZ)
  # Coverage feedback needs the libraries instrumented too, not only the targets.
  foreach(library linspec_kernels linspec_models linspec_server)
    target_compile_options(${library} PRIVATE -fsanitize=fuzzer-no-link)
  endforeach()
endif()
