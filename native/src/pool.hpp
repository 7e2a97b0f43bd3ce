// Compute threads that live as long as the model: a step is one parallel region of many short phases.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tokenloom {

// Waiting spins for at most this long, then sleeps: on two cores the threads share with the API process.
constexpr int64_t kSpinNanoseconds = 50'000;

// `threads` threads, the caller's included. One region at a time; `run` is not for several threads at once.
class ThreadPool {
  public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // job(context, thread) on every thread; returns when all are done. A job must not throw: others may wait for
    // it at a barrier.
    void run(void (*job)(void* context, int thread), void* context);

    template <class Job>
    void run(Job&& job) {
        run([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
    }

    // Within a region: waits until every thread has come here.
    void barrier();

  private:
    void work(int thread);
    void close();

    const int size_;
    std::vector<std::thread> threads_;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> region_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<bool> closing_{false};
};

// Parts of what is left, for items that are work enough each.
constexpr int64_t kOneByOne = INT64_MAX;

// Hands out [0, count), count below 2^31, in runs that shrink towards the end: long ones keep a stream of weights
// going, short ones let the threads finish together. Threads of even number take from the front and those of odd
// number from the back, so that from phase to phase a thread mostly meets the rows that lie in its caches.
class alignas(64) WorkCounter {
  public:
    // Before the barrier or the region ahead.
    void reset() { taken_.store(0, std::memory_order_relaxed); }
    // The next run, a `parts`-th of what is left but at least one item; false when nothing is.
    bool take(int thread, int64_t count, int64_t parts, int64_t& begin, int64_t& end) {
        const int shift = thread % 2 * 32;
        uint64_t taken = taken_.load(std::memory_order_relaxed), run;
        do {
            begin = static_cast<int64_t>(taken & 0xffffffff);
            end = count - static_cast<int64_t>(taken >> 32);
            if (begin >= end) return false;
            run = static_cast<uint64_t>(std::max<int64_t>(1, (end - begin) / parts));
        } while (!taken_.compare_exchange_weak(taken, taken + (run << shift), std::memory_order_relaxed));
        (shift ? begin : end) = shift ? end - static_cast<int64_t>(run) : begin + static_cast<int64_t>(run);
        return true;
    }

  private:
    std::atomic<uint64_t> taken_{0};  // from the front, from the back
};

}  // namespace tokenloom
