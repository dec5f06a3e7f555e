// Dropout's mask, the same numbers on every device. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/vector/vector.h"

#include <cmath>

namespace lowrank::cpu::LOWRANK_ISA {

struct Dropout {
    bool on;
    uint32_t threshold, key0, key1;
    float inverse;     // 1 / (1 - p)
    int64_t first = 0; // the row of the mask that belongs to row 0

    Dropout(double p, int64_t seed)
        : on(p > 0), threshold(0), key0(uint32_t(uint64_t(seed))), key1(uint32_t(uint64_t(seed) >> 32)),
          inverse(float(1.0 / (1.0 - p))) {
        const double words = std::nearbyint(p * 4294967296.0);
        threshold = words < 4294967295.0 ? uint32_t(words) : 0xffffffffu;
    }

    // Zeroes the dropped elements k, k + 1, … of row m; k is a multiple of 4.
    // Philox-4x32-10: word k % 4 of counter (k / 4, m, 0, 0).
    void apply(int64_t m, int64_t k, int64_t count, float* row) const {
        constexpr int kBatch = 16;
        for (int64_t i = 0; i < count; i += 4 * kBatch) {
            uint32_t c[4][kBatch], keep[kBatch][4];
            for (int j = 0; j < kBatch; ++j) {
                c[0][j] = uint32_t((k + i) / 4 + j);
                c[1][j] = uint32_t(first + m);
                c[2][j] = c[3][j] = 0;
            }
            uint32_t k0 = key0, k1 = key1;
            for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9, k1 += 0xbb67ae85) {
                for (int j = 0; j < kBatch; ++j) {
                    const uint64_t a = uint64_t(0xd2511f53) * c[0][j], b = uint64_t(0xcd9e8d57) * c[2][j];
                    c[0][j] = uint32_t(b >> 32) ^ c[1][j] ^ k0;
                    c[1][j] = uint32_t(b);
                    c[2][j] = uint32_t(a >> 32) ^ c[3][j] ^ k1;
                    c[3][j] = uint32_t(a);
                }
            }
            for (int j = 0; j < kBatch; ++j)
                for (int word = 0; word < 4; ++word)
                    keep[j][word] = c[word][j] >= threshold;
            const uint32_t* flat = keep[0];
            const int64_t n = min(4 * kBatch, count - i);
            for (int64_t j = 0; j < n; ++j)
                row[i + j] = flat[j] ? row[i + j] : 0.0f;
        }
    }
};

} // namespace lowrank::cpu::LOWRANK_ISA
