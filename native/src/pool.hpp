// Compute threads that live as long as the model: a step is one parallel region of many short phases.
#pragma once

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

    // job(context, thread) on every thread; returns when all are done. The job must not throw.
    void run(void (*job)(void* context, int thread), void* context);

    template <class Job>
    void run(Job&& job) {
        run([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
    }

    // Within a region: waits until every thread has come here.
    void barrier();

  private:
    void work(int thread);

    const int size_;
    std::vector<std::thread> threads_;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> region_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<bool> closing_{false};
};

// Hands out [0, count) in runs to whoever asks first. One per phase; `reset` before the barrier ahead of it.
class alignas(64) WorkCounter {
  public:
    void reset() { next_.store(0, std::memory_order_relaxed); }
    // The next run of at most `grain` items; false when none are left.
    bool take(int64_t count, int64_t grain, int64_t& begin, int64_t& end) {
        begin = next_.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= count) return false;
        end = begin + grain < count ? begin + grain : count;
        return true;
    }

  private:
    std::atomic<int64_t> next_{0};
};

}  // namespace tokenloom
