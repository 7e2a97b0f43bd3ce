// What is done to the KV pool between steps.
#include <cstring>

#include "model.hpp"
#include "refuse.hpp"

namespace tokenloom {

namespace {

constexpr int64_t kFewCopies = 512;  // of a head's key: done sooner than other threads wake up

}  // namespace

void Model::move_slots(const int64_t* moves, int64_t count) {
    if (!kv_) refuse("the model has no KV pool");
    check_moves(*kv_, moves, count);
    const int64_t heads = int64_t{kv_->layout.num_layers} * kv_->layout.num_kv_heads;
    if (count * heads <= kFewCopies) return tokenloom::move_slots(*kv_, moves, count, 0, heads);
    const int64_t threads = threads_->size();
    threads_->run([&](int thread) noexcept {
        tokenloom::move_slots(*kv_, moves, count, heads * thread / threads, heads * (thread + 1) / threads);
    });
}

void Model::clear_kv_pages(const int32_t* pages, int64_t count) {
    if (!kv_) refuse("the model has no KV pool");
    for (int64_t i = 0; i < count; ++i)
        if (pages[i] < 0 || pages[i] >= kv_->num_pages())
            refuse("pages names page " + number(pages[i]) + " outside the pool");
    for (int64_t i = 0; i < count; ++i)
        std::memset(kv_->page(pages[i]), 0, static_cast<size_t>(kv_->layout.page_bytes()));
}

}  // namespace tokenloom
