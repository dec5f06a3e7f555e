# add_cpu_kernels(target): the CPU kernels for every instruction set of the processor that is built for.
#
# One translation unit per op family and instruction set, and one for the products with few tokens, which all families use.
# runtime/isa.cpp chooses among the instruction sets at run time.
include(CheckCXXCompilerFlag)

# -ffp-contract=off: the bits of the encoder and the scales are exact, so the compiler must not fuse operations by itself.
set(cpu_flags -O3 -fno-math-errno -ffp-contract=off)
# The least instruction set comes first, because the linker keeps the first version of a std template that several object
# files hold.
set(isas portable)
set(flags_portable "")
# A build for macOS may name another processor than that of the machine that builds.
set(processor ${CMAKE_SYSTEM_PROCESSOR})
if(APPLE AND CMAKE_OSX_ARCHITECTURES)
    set(processor ${CMAKE_OSX_ARCHITECTURES})
    list(LENGTH processor count)
    if(count GREATER 1)
        message(FATAL_ERROR "build for one architecture at a time, got CMAKE_OSX_ARCHITECTURES='${processor}': "
                            "every instruction set has its own flags")
    endif()
endif()
if(processor MATCHES "x86_64|AMD64")
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx_vnni ${flags_avx2} -mavxvnni)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
    set(flags_avx512_vnni ${flags_avx512} -mavx512vnni)
    set(flags_avx512_bf16 ${flags_avx512_vnni} -mavx512bf16)
    list(APPEND isas avx2 avx_vnni avx512 avx512_vnni avx512_bf16)
    # A process must request the matrix unit from Linux; isa.cpp does so with a system call of Linux.
    check_cxx_compiler_flag(-mamx-bf16 LOWRANK_HAS_AMX)
    if(LOWRANK_HAS_AMX AND CMAKE_SYSTEM_NAME STREQUAL Linux)
        set(flags_amx ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
        list(APPEND isas amx)
        add_compile_definitions($<$<COMPILE_LANGUAGE:CXX>:LOWRANK_OPS_AMX>)
    endif()
elseif(processor MATCHES "aarch64|arm64|ARM64")
    set(isas neon neon_bf16)
    set(flags_neon "") # every 64-bit ARM processor has NEON
    set(flags_neon_bf16 -march=armv8.2-a+bf16)
endif()
set(LOWRANK_OPS_ISA_ONLY "" CACHE STRING "build the kernels of this instruction set alone, for tests")
if(LOWRANK_OPS_ISA_ONLY)
    set(isas ${LOWRANK_OPS_ISA_ONLY})
    add_compile_definitions($<$<COMPILE_LANGUAGE:CXX>:LOWRANK_OPS_ISA_ONLY=${LOWRANK_OPS_ISA_ONLY}>)
endif()
set(cpu_source ${CMAKE_CURRENT_LIST_DIR})
file(GLOB cpu_units CONFIGURE_DEPENDS ${cpu_source}/*.cpp ${cpu_source}/product/*.cpp)
# GCC vectorises the conditions in its loops only if it may assume that no operation traps.
set_source_files_properties(${cpu_source}/preference.cpp PROPERTIES COMPILE_OPTIONS -fno-trapping-math)

function(add_cpu_kernels target)
    foreach(isa IN LISTS isas)
        add_library(cpu_${isa} OBJECT ${cpu_units})
        target_include_directories(cpu_${isa} PRIVATE ${cpu_source}/..)
        target_compile_definitions(cpu_${isa} PRIVATE LOWRANK_ISA=${isa})
        target_compile_options(cpu_${isa} PRIVATE ${cpu_flags} ${flags_${isa}})
        target_link_libraries(${target} PRIVATE cpu_${isa})
    endforeach()
    target_sources(${target} PRIVATE ${cpu_source}/runtime/checks.cpp ${cpu_source}/runtime/isa.cpp
                                     ${cpu_source}/runtime/scratch.cpp ${cpu_source}/runtime/threads.cpp)
    target_include_directories(${target} PRIVATE ${cpu_source}/..)
    target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
endfunction()
