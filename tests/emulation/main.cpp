// Runs emulated kernels on arrays from standard input; tests/ops/test_cuda_emulation.py writes them and reads the
// results.
//
//   decode              any number of requests: nine int64 (format, numel, block_size, absmax bytes, absmax2 entries,
//                       out_dtype, bytes of output, misaligned: 1 packed + 2 out, seed), then packed, absmax, absmax2
//                       and offset where there are any; answers with the output's bytes
//   cholesky            any number of requests: three int64 (batch, q, seed), then float64 [batch, q, q]; answers with
//                       float64 [batch, q, q] and int32 [batch]
//   eigen               the same; answers with float64 [batch, q], float64 [batch, q, q] and int32 [batch]
//   routed              any number of requests: eleven int64 (M, N, K, dtype, stride of x, bytes of the arena,
//                       slots, capacity, S or 0 for no strengths, misaligned: 1 x + 2 arena, seed), then x, arena,
//                       table, slots, strengths and y; answers with y
//   defect NAME SEED    prints right or wrong
//   warp THREADS SEED   answers with 12 * 32 + 3 int32
//   convert             answers with float32 [2, 65536], every float16 and every bfloat16, and these converted back,
//                       uint16 [2, 65536]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/nf4.h"
#include "cuda/routed_linear.h"
#include "cuda/svd.h"
#include "cuda_emulation.h"
#include "defects.h"

namespace {

// Ends exactly after its data, so that the address sanitizer catches an access behind it; starts `offset` bytes after a
// multiple of 16.
class Buffer {
public:
    Buffer(size_t bytes, size_t offset) : bytes_(bytes), offset_(offset), memory_(new char[offset + bytes]) {
        std::memset(memory_.get(), 0xff, offset + bytes);
    }
    char* data() { return memory_.get() + offset_; }
    void read() {
        if (std::fread(data(), 1, bytes_, stdin) != bytes_)
            throw std::runtime_error("request cut short");
    }
    void write() { std::fwrite(data(), 1, bytes_, stdout); }

private:
    size_t bytes_, offset_;
    std::unique_ptr<char[]> memory_;
};

void decode() {
    int64_t request[9];
    while (std::fread(request, sizeof(request), 1, stdin) == 1) {
        const auto [format, numel, block_size, absmax_bytes, absmax2_entries, out_dtype, out_bytes, misaligned, seed] =
            request;
        Buffer packed(format == 7 ? numel : (numel + 1) / 2, misaligned & 1), absmax(absmax_bytes, 0),
            absmax2(4 * absmax2_entries, 0);
        Buffer offset(4, 0), out(out_bytes, misaligned & 2 ? out_bytes / numel : 0);
        packed.read();
        absmax.read();
        absmax2.read();
        if (absmax2_entries)
            offset.read();
        emulation::seed = seed;
        lowrank::cuda::dequantize(static_cast<int>(format), reinterpret_cast<uint8_t*>(packed.data()), absmax.data(),
                                  absmax2_entries ? reinterpret_cast<float*>(absmax2.data()) : nullptr,
                                  absmax2_entries ? reinterpret_cast<float*>(offset.data()) : nullptr, numel,
                                  block_size, out.data(), static_cast<int>(out_dtype), nullptr);
        out.write();
    }
}

void small_dense(bool eigen) {
    int64_t request[3];
    while (std::fread(request, sizeof(request), 1, stdin) == 1) {
        const auto [batch, q, seed] = request;
        const size_t bytes = sizeof(double) * batch * q * q;
        Buffer gram(bytes, 0), matrix(bytes, 0), work(2 * bytes, 0), values(sizeof(double) * batch * q, 0);
        Buffer failed(sizeof(int32_t) * batch, 0);
        const auto doubles = [](Buffer& buffer) { return reinterpret_cast<double*>(buffer.data()); };
        const auto flags = reinterpret_cast<int32_t*>(failed.data());
        gram.read();
        emulation::seed = seed;
        if (eigen) {
            lowrank::cuda::eigenvectors(doubles(gram), batch, q, doubles(work), doubles(values), doubles(matrix), flags,
                                        nullptr);
            values.write();
        } else {
            lowrank::cuda::inverse_cholesky(doubles(gram), batch, q, doubles(matrix), flags, nullptr);
        }
        matrix.write();
        failed.write();
    }
}

void routed() {
    int64_t request[11];
    while (std::fread(request, sizeof(request), 1, stdin) == 1) {
        const auto [M, N, K, dtype, x_stride, arena_bytes, slot_count, capacity, S, misaligned, seed] = request;
        const int64_t entries = M * (S ? S : 1);
        const size_t element = dtype == 0 ? 4 : 2;
        Buffer x(M ? element * ((M - 1) * x_stride + K) : 0, misaligned & 1 ? element : 0);
        Buffer arena(arena_bytes, misaligned & 2 ? 8 : 0), table(sizeof(lowrank::ArenaRow) * slot_count, 0);
        Buffer slots(sizeof(int32_t) * entries, 0), strengths(sizeof(float) * M * S, 0);
        Buffer h(sizeof(float) * entries * capacity, 0), y(element * M * N, 0);
        for (Buffer* buffer : {&x, &arena, &table, &slots, &strengths, &y})
            buffer->read();
        emulation::seed = seed;
        lowrank::cuda::RoutedUpdate u{};
        u.M = M, u.N = N, u.K = K;
        u.x = x.data(), u.dtype = static_cast<int>(dtype), u.x_stride = x_stride;
        u.arena = reinterpret_cast<const uint8_t*>(arena.data());
        u.table = reinterpret_cast<const lowrank::ArenaRow*>(table.data()), u.slot_count = slot_count;
        u.S = S ? S : 1, u.slots = reinterpret_cast<const int32_t*>(slots.data());
        u.strengths = S ? reinterpret_cast<const float*>(strengths.data()) : nullptr;
        u.h = reinterpret_cast<float*>(h.data()), u.capacity = capacity, u.y = y.data();
        lowrank::cuda::routed_update(u, nullptr);
        y.write();
    }
}

void convert() {
    constexpr int kValues = 65536;
    std::vector<float> values(2 * kValues);
    std::vector<uint16_t> back(2 * kValues);
    for (int i = 0; i < kValues; ++i) {
        const auto bits = static_cast<uint16_t>(i);
        values[i] = __half2float(__half{bits});
        values[kValues + i] = __bfloat162float(__nv_bfloat16{bits});
        back[i] = __float2half_rn(values[i]).bits;
        back[kValues + i] = __float2bfloat16_rn(values[kValues + i]).bits;
    }
    std::fwrite(values.data(), sizeof(float), values.size(), stdout);
    std::fwrite(back.data(), sizeof(uint16_t), back.size(), stdout);
}

} // namespace

int main(int argc, char** argv) try {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (argc == 4)
        emulation::seed = std::stoull(argv[3]);
    if (mode == "decode" && argc == 2) {
        decode();
    } else if ((mode == "cholesky" || mode == "eigen") && argc == 2) {
        small_dense(mode == "eigen");
    } else if (mode == "routed" && argc == 2) {
        routed();
    } else if (mode == "convert" && argc == 2) {
        convert();
    } else if (mode == "defect" && argc == 4) {
        std::puts(run_defect(argv[2]) ? "right" : "wrong");
    } else if (mode == "warp" && argc == 4) {
        std::vector<int32_t> out(12 * 32), counters{0, INT32_MIN, INT32_MAX};
        run_warp_values(std::stoi(argv[2]), out.data(), counters.data());
        out.insert(out.end(), counters.begin(), counters.end());
        std::fwrite(out.data(), sizeof(int32_t), out.size(), stdout);
    } else {
        std::fprintf(stderr, "usage: see the head of main.cpp\n");
        return 2;
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
}
