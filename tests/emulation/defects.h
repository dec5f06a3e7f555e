#pragma once

#include <string>

// Whether the kernels of defects.cu, with the named defect in one of them, compute what they should.
bool run_defect(const std::string& name);

// out: 12 rows of 32, one per warp operation (defects.cu); counters: three integers, atomically updated.
void run_warp_values(int threads, int* out, int* counters);
