# What `cmake --install` lays out and deploy/bundle.sh packs: bin/linspec, the shared libraries it needs beyond glibc,
# the bundled models and the licence. The libraries find each other through DT_RPATH (see --disable-new-dtags).
if(TARGET linspec)
  install(TARGETS linspec RUNTIME_DEPENDENCY_SET linspec_dependencies RUNTIME DESTINATION bin)
  # Of the host: the dynamic loader and glibc, whose parts must match each other, and the GPU driver.
  install(RUNTIME_DEPENDENCY_SET linspec_dependencies DESTINATION lib
    PRE_EXCLUDE_REGEXES "^ld-linux" "^libc\\.so" "^libm\\.so" "^libdl\\.so" "^librt\\.so" "^libpthread\\.so"
      "^libresolv\\.so" "^libcuda" "^libcublas" "^libnvidia")
endif()
install(DIRECTORY models/bundled/ DESTINATION share/linspec/models OPTIONAL)
install(FILES LICENSE README.md DESTINATION share/doc/linspec)
