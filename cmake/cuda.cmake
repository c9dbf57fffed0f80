# The CUDA backend (LINSPEC_CUDA=ON): kernels, device test and benchmark. Nothing of CUDA is linked into the server.
# CMake 3.25 does not know nvcc 13's C++20 flag: enable the language, then name the flag, then ask for the standard.
set(LINSPEC_CUDA_ARCHITECTURES "90" CACHE STRING "e.g. 90, or 80;86;89;90;100;120 for a release")
list(TRANSFORM LINSPEC_CUDA_ARCHITECTURES REPLACE "^90$" "90a")  # wgmma; there is no other chip that runs sm_90 code
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER} CACHE FILEPATH "")
set(CMAKE_CUDA_ARCHITECTURES ${LINSPEC_CUDA_ARCHITECTURES})
find_program(CMAKE_CUDA_COMPILER nvcc HINTS /usr/local/cuda/bin)
enable_language(CUDA)
# The find module of Debian's CMake 3.25.1 fails without nvToolsExt, which CUDA 13 has no more, unless the project could do
# with an older CMake.
set(minimum_version ${CMAKE_MINIMUM_REQUIRED_VERSION})
set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_MINIMUM_REQUIRED_VERSION ${minimum_version})
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

# The folder's warning and contraction flags are for C++ only.
get_directory_property(flags COMPILE_OPTIONS)
list(TRANSFORM flags REPLACE "^(.+)$" "$<$<COMPILE_LANGUAGE:CXX>:\\1>")
set_directory_properties(PROPERTIES COMPILE_OPTIONS "${flags}")
if(CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS kernels/cuda/*.cu)
add_library(linspec_cuda_kernels STATIC ${cuda_sources} kernels/cuda/cublas_gemm.cc)
target_include_directories(linspec_cuda_kernels SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})  # cublasLt.h; never linked
target_link_libraries(linspec_cuda_kernels PUBLIC ${CMAKE_DL_LIBS})
set_target_properties(linspec_cuda_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)

# Programs that run on a GPU machine as they are: Abseil, fmt, cudart and the C++ runtime inside, only glibc outside.
# They are not ctest tests: the machine that builds has no GPU. tests/cuda/run_on_gpu.sh runs them.
file(GLOB cpu_reference CONFIGURE_DEPENDS kernels/*.cc kernels/cpu/*.cc)
file(GLOB absl_archives /usr/lib/${CMAKE_CXX_LIBRARY_ARCHITECTURE}/libabsl_*.a)
function(linspec_device_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE linspec_cuda_kernels CUDA::cudart_static fmt::fmt-header-only Threads::Threads
    -Wl,--start-group ${absl_archives} -Wl,--end-group)
  target_link_options(${name} PRIVATE -static-libstdc++ -static-libgcc -s)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/device)
endfunction()
linspec_device_program(cuda_device_test tests/cuda/device_test.cc models/sampler.cc models/draft_candidates.cc ${cpu_reference})
linspec_device_program(cuda_state_test tests/cuda/state_test.cc ${cpu_reference})
linspec_device_program(cuda_gemm_test tests/cuda/gemm_test.cc tests/cuda/gemm_reference.cu)
linspec_device_program(cuda_device_bench tests/cuda/device_bench.cc tests/cuda/gemm_reference.cu
  tests/cuda/read_bandwidth.cu)
linspec_device_program(cuda_attention_test tests/cuda/attention_test.cc)
linspec_device_program(cuda_attention_bench tests/cuda/attention_bench.cc tests/cuda/per_node.cu tests/cuda/read_bandwidth.cu)

# The plugin that the server loads at start when it is there (kernels/cuda_device.h). It holds cudart and needs nothing
# but glibc and, to find a GPU, the driver.
add_library(linspec_cuda MODULE kernels/cuda/plugin.cc kernels/cuda/context.cc kernels/cuda/device_model.cc
  kernels/cuda/device_forward.cc kernels/cuda/device_scratch.cc kernels/cuda/device_chain.cc kernels/cuda/device_drafter.cc
  kernels/cuda/device_follow.cc kernels/cuda/graph_cache.cc kernels/cuda/products.cc)
target_link_libraries(linspec_cuda PRIVATE linspec_cuda_kernels CUDA::cudart_static)
target_link_options(linspec_cuda PRIVATE -static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL)
set_target_properties(linspec_cuda PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
install(TARGETS linspec_cuda LIBRARY DESTINATION lib)

# The model and the engine on the GPU: needs the shared libraries that the bundle carries, and the plugin beside it.
foreach(name model draft)
  add_executable(cuda_${name}_test tests/cuda/${name}_test.cc)
  target_link_libraries(cuda_${name}_test PRIVATE linspec_scheduler)
  set_target_properties(cuda_${name}_test PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/device
    INSTALL_RPATH "$ORIGIN/../../lib")
endforeach()
set(gpu_check libexec/linspec-gpu-check)
install(TARGETS cuda_device_test cuda_state_test cuda_gemm_test cuda_device_bench cuda_attention_test cuda_attention_bench cuda_model_test
  cuda_draft_test RUNTIME DESTINATION ${gpu_check})
install(PROGRAMS tests/cuda/run_on_gpu.sh DESTINATION ${gpu_check})
install(DIRECTORY tests/data/tiny DESTINATION ${gpu_check})
add_custom_target(cuda_everything DEPENDS linspec_cuda cuda_device_test cuda_state_test cuda_gemm_test cuda_device_bench cuda_attention_test cuda_attention_bench
  cuda_model_test cuda_draft_test)
