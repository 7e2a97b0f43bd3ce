// Measuring the machine's limits on all threads of a pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <chrono>
#include <stdexcept>

#include "limits.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace nb = nanobind;

namespace tokenloom {

namespace {

template <class Job>
double seconds_of(ThreadPool& pool, Job&& job) {
    auto start = std::chrono::steady_clock::now();
    pool.run(job);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second of the best of `rounds` sweeps over `bytes` per thread.
double bandwidth(ThreadPool& pool, const std::string& isa, int64_t bytes, int rounds) {
    if (bytes < 4096 || bytes > (int64_t{1} << 36) || rounds < 1 || rounds > 1000)
        throw std::invalid_argument("bytes must be from 4 KiB to 64 GiB, rounds from 1 to 1000");
    const LimitKernels& kernels = limit_kernels_for(find_isa(isa));
    bytes = bytes / 256 * 256;
    nb::gil_scoped_release release;
    Memory memory(static_cast<size_t>(bytes * pool.size()));
    pool.run([&](int thread) {
        uint8_t* part = memory.data() + thread * bytes;
        for (int64_t i = 0; i < bytes; i += 64) part[i] = static_cast<uint8_t>(i);
    });
    std::atomic<int32_t> sink{0};
    double best = 1e30;
    for (int i = 0; i < rounds; ++i) {
        double took = seconds_of(pool, [&](int thread) { sink += kernels.read(memory.data() + thread * bytes, bytes); });
        best = took < best ? took : best;
    }
    return static_cast<double>(bytes * pool.size()) / best;
}

// Operations per second in registers, the best of 5 runs.
double peak(ThreadPool& pool, const std::string& isa, const std::string& format, int64_t iterations) {
    if (iterations < 1 || iterations > (int64_t{1} << 32)) throw std::invalid_argument("iterations");
    Format chosen = format == "float32" ? Format::f32 : format == "bfloat16" ? Format::bf16 : Format::i8;
    const LimitKernels& kernels = limit_kernels_for(find_isa(isa));
    nb::gil_scoped_release release;
    std::atomic<float> sink{0};
    double best = 1e30;
    for (int i = 0; i < 5; ++i) {
        double took = seconds_of(pool, [&](int) { sink.store(kernels.multiply(chosen, iterations)); });
        best = took < best ? took : best;
    }
    return static_cast<double>(operations_per_round(chosen) * iterations * pool.size()) / best;
}

}  // namespace

void bind_limits(nb::module_& m) {
    m.def("bandwidth", &bandwidth, nb::arg("pool"), nb::arg("isa"), nb::arg("bytes"), nb::arg("rounds"));
    m.def("peak", &peak, nb::arg("pool"), nb::arg("isa"), nb::arg("format"), nb::arg("iterations"));
}

}  // namespace tokenloom
