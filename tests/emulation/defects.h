#pragma once

#include <string>

// True if the kernels of defects.cu, one of which has the named defect, compute the right results.
bool run_defect(const std::string& name);

// out: 12 rows of 32, one per warp operation (defects.cu); counters: three integers, atomically updated.
void run_warp_values(int threads, int* out, int* counters);
