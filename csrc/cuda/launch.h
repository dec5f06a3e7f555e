// Launches, shared memory and launch errors of the CUDA kernels.
//
// Kernels use these three macros instead of <<<>>> and __shared__, so that a kernel is also plain C++: with
// LOWRANK_EMULATE the same file compiles against tests/emulation/cuda_emulation.h, which runs the kernels on the host.
//
//   LOWRANK_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...)   brackets where there are commas
//   LOWRANK_SHARED(float, tile, [32][33]);              static shared memory, 16-byte aligned
//   LOWRANK_DYNAMIC_SHARED(float, buffer);              float* to the launch's shared_bytes
#pragma once

#include <stdexcept>
#include <string>

#ifdef LOWRANK_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LOWRANK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                 \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define LOWRANK_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define LOWRANK_DYNAMIC_SHARED(type, name)                                                                             \
    extern __shared__ __align__(16) unsigned char lowrank_dynamic_shared[];                                            \
    type* const name = reinterpret_cast<type*>(lowrank_dynamic_shared)
#endif

namespace lowrank::cuda {

// Throws std::runtime_error if CUDA refused the last launch. As everywhere in CUDA, errors of a running kernel show at
// the next synchronisation.
inline void check_launch(const char* name) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

} // namespace lowrank::cuda
