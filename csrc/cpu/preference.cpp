// The Bradley-Terry loss on a CPU and its gradients: mean of the cross entropy of sigmoid(d) with a label, where
// d = chosen - rejected - margin, and of center * (chosen + rejected)^2. Compiled once per instruction set.
#include "cpu/runtime/isa.h"
#include "cpu/vector/vector.h"

#include <cmath>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// Pairs per block. Each block is summed in a fixed order and the sums of blocks are added in order, so the bits do not
// depend on threads.
constexpr int64_t kBlock = 1024;

// exp(-x) for x >= 0, relative error below 2e-7 to x = 87, exp(-87) beyond: 2^-n by its bits, the rest by its
// Taylor polynomial. Plain arithmetic without a branch, which the compiler turns into vectors. NaN stays NaN through
// the last addition.
LOWRANK_INLINE float exp_minus(float x) {
    const float t = x < 87.0f ? x : 87.0f;
    const float n = float(int32_t(t * 1.44269504f + 0.5f));
    const float f = (n * 0.693359375f - t) - n * 2.12194440e-4f; // n ln 2 - t, in two steps so that it is exact enough
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const int32_t bits = (127 - int32_t(n)) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale + 0.0f * x;
}

// log(1 + e) for 0 <= e <= 1, relative error below 2e-7: 2 artanh(s), s = e / (2 + e) <= 1/3.
LOWRANK_INLINE float log_one_plus(float e) {
    const float s = e / (2.0f + e), q = s * s;
    float p = 1.0f / 15;
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

LOWRANK_INLINE double exp_minus(double x) {
    return std::exp(-x);
}
LOWRANK_INLINE double log_one_plus(double e) {
    return std::log1p(e);
}

template <class T>
LOWRANK_INLINE const float* widened(const T* p, int64_t count, float* buffer) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(buffer + i, load(p + i));
    for (; i < count; ++i) {
        float lanes[kLanes];
        store(lanes, load_n(p + i, 1));
        buffer[i] = lanes[0];
    }
    return buffer;
}
LOWRANK_INLINE const float* widened(const float* p, int64_t, float*) {
    return p;
}
LOWRANK_INLINE const double* widened(const double* p, int64_t, double*) {
    return p;
}

template <class T>
LOWRANK_INLINE void narrowed(const float* buffer, int64_t count, T* p) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(p + i, load(buffer + i));
    if (i < count)
        store_n(p + i, load_n(buffer + i, count - i), count - i);
}
LOWRANK_INLINE void narrowed(const double* buffer, int64_t count, double* p) {
    std::memcpy(p, buffer, size_t(count) * sizeof(double));
}

// body(T, F): T as stored, F as computed in.
template <class Body>
void with_types(int dtype, const Body& body) {
    if (dtype == kFloat64)
        body(double{}, double{});
    else
        with_type(dtype, [&](auto t) { body(t, float{}); });
}

// A label outside [0, 1] or NaN is not a probability and gives NaN. There is one comparison because the compiler would
// make a branch of two.
template <class F>
LOWRANK_INLINE F checked(F label) {
    return label * (F(1) - label) >= 0 ? label : F(NAN);
}

// A block's operands: a null pointer of margin or labels becomes the value that it stands for.
template <class F>
struct Block {
    F chosen_[kBlock], rejected_[kBlock], margin_[kBlock], label_[kBlock];
    const F *chosen, *rejected, *margin, *label;
    int64_t count;

    template <class T>
    LOWRANK_INLINE Block(const Preference& a, int64_t first, T) : count(min(kBlock, a.n - first)) {
        chosen = widened(static_cast<const T*>(a.chosen) + first, count, chosen_);
        rejected = widened(static_cast<const T*>(a.rejected) + first, count, rejected_);
        margin = operand(a.margin, first, F(0), margin_);
        label = operand(a.labels, first, F(1), label_);
    }

    LOWRANK_INLINE const F* operand(const void* p, int64_t first, F value, F* buffer) const {
        if (p)
            return static_cast<const F*>(p) + first;
        for (int64_t i = 0; i < count; ++i)
            buffer[i] = value;
        return buffer;
    }
};

// Adds loss i to sum i % 16 in double, an order that vectors of any width can keep.
template <class F>
LOWRANK_INLINE double sum(F* losses, int64_t count) {
    constexpr int kSums = 16;
    double sums[kSums] = {}, total = 0;
    while (count % kSums)
        losses[count++] = 0;
    for (int64_t i = 0; i < count; i += kSums)
        for (int j = 0; j < kSums; ++j)
            sums[j] += double(losses[i + j]);
    for (double s : sums)
        total += s;
    return total;
}

void forward(const Preference& a) {
    with_types(a.dtype, [&](auto t, auto f) {
        using F = decltype(f);
        const int64_t blocks = ceil_div(a.n, kBlock);
        const Scratch scratch;
        double* sums = scratch.take<double>(blocks);
        parallel_for(a.threads, blocks, [&](int64_t b) {
            const Block<F> v(a, b * kBlock, t);
            F losses[kBlock];
            const F center = F(a.center);
            for (int64_t i = 0; i < v.count; ++i) {
                const F d = v.chosen[i] - v.rejected[i] - v.margin[i], sum = v.chosen[i] + v.rejected[i];
                const F size = std::fabs(d), y = checked(v.label[i]);
                const F against = d > 0 ? F(1) - y : y; // the label's probability of the less likely side
                losses[i] = log_one_plus(exp_minus(size)) + against * size + center * (sum * sum);
            }
            sums[b] = sum(losses, v.count);
        });
        double total = 0;
        for (int64_t b = 0; b < blocks; ++b)
            total += sums[b];
        *static_cast<F*>(a.loss) = F(total / double(a.n));
    });
}

void backward(const Preference& a) {
    with_types(a.dtype, [&](auto t, auto f) {
        using T = decltype(t);
        using F = decltype(f);
        parallel_for(a.threads, ceil_div(a.n, kBlock), [&](int64_t b) {
            const Block<F> v(a, b * kBlock, t);
            F dchosen[kBlock], drejected[kBlock];
            const F g = *static_cast<const F*>(a.g) / F(a.n), center = 2 * F(a.center);
            for (int64_t i = 0; i < v.count; ++i) {
                const F d = v.chosen[i] - v.rejected[i] - v.margin[i], y = checked(v.label[i]);
                const F size = std::fabs(d), e = exp_minus(size);
                // sigmoid(d) - y, written as (1 - y) sigmoid(d) - y sigmoid(-d) to avoid cancellation at both ends.
                const F less = e / (F(1) + e), more = F(1) / (F(1) + e);
                const F slope = (F(1) - y) * (d > 0 ? more : less) - y * (d > 0 ? less : more);
                const F pull = center * (v.chosen[i] + v.rejected[i]);
                dchosen[i] = g * (pull + slope);
                drejected[i] = g * (pull - slope);
            }
            narrowed(dchosen, v.count, static_cast<T*>(a.dchosen) + b * kBlock);
            narrowed(drejected, v.count, static_cast<T*>(a.drejected) + b * kBlock);
        });
    });
}

} // namespace

extern const PreferenceKernels preference_kernels = {forward, backward};

} // namespace lowrank::cpu::LOWRANK_ISA
