// Large zeroed arrays that do not come from the heap.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace tokenloom {

// `bytes` zeroed bytes at the start of a page, in huge pages where the system gives them (a stream through
// weights in small pages stops at each of them). Pages are taken when they are first written.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        if (!bytes) return;
        // A mapping that begins inside a huge page cannot use it: map one more and keep the aligned part.
        constexpr size_t huge = size_t{2} << 20;
        size_t slack = bytes >= huge ? huge : 0;
        void* p = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        map_ = static_cast<uint8_t*>(p);
        mapped_ = bytes + slack;
        data_ = map_;
        if (slack) {
            data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + huge - 1) / huge * huge);
            madvise(data_, bytes, MADV_HUGEPAGE);
        }
    }
    Memory(Memory&& other) noexcept { swap(other); }
    Memory& operator=(Memory&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Memory() {
        if (map_) munmap(map_, mapped_);
    }

    uint8_t* data() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    void swap(Memory& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(map_, other.map_);
        std::swap(bytes_, other.bytes_);
        std::swap(mapped_, other.mapped_);
    }

    uint8_t* data_ = nullptr;
    uint8_t* map_ = nullptr;
    size_t bytes_ = 0;
    size_t mapped_ = 0;
};

}  // namespace tokenloom
