#include "pool.hpp"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenloom {

namespace {

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Returns once `value` is no longer `old`.
void await_change(std::atomic<uint32_t>& value, uint32_t old) {
    using Clock = std::chrono::steady_clock;
    // Most waits are over before the clock needs to be read.
    for (int i = 0; i < 256; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    auto limit = Clock::now() + std::chrono::nanoseconds(kSpinNanoseconds);
    do {
        for (int i = 0; i < 64; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (Clock::now() < limit);
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be from 1 to 1024");
    try {
        for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& error) {
        const std::string started = std::to_string(threads_.size() + 1);
        close();
        throw std::runtime_error("only " + started + " of " + std::to_string(size_) + " threads started: " + error.what());
    }
}

ThreadPool::~ThreadPool() { close(); }

void ThreadPool::close() {
    closing_ = true;
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(void (*job)(void*, int), void* context) {
    if (size_ == 1) {
        job(context, 0);
        return;
    }
    job_ = job;
    context_ = context;
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
    job(context, 0);
    barrier();
}

void ThreadPool::work(int thread) {
    uint32_t seen = 0;
    while (true) {
        await_change(region_, seen);
        ++seen;
        if (closing_) return;
        job_(context_, thread);
        barrier();
    }
}

void ThreadPool::barrier() {
    if (size_ == 1) return;
    uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        await_change(phase_, phase);
    }
}

}  // namespace tokenloom
