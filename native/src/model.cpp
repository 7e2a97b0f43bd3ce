#include "model.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <numeric>

#include "refuse.hpp"

namespace tokenloom {

namespace {

constexpr int64_t kCounterSpace = 16;  // ints between the phase numbers of two threads: a cache line

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void within(const char* name, const int32_t* values, int64_t count, int64_t low, int64_t high) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; ++i) {
        least = std::min(least, values[i]);
        most = std::max(most, values[i]);
    }
    if (count && (least < low || most >= high))
        refuse(std::string(name) + " has values from " + number(least) + " to " + number(most) + ", outside [" +
               number(low) + ", " + number(high) + ")");
}

// Grows, keeping nothing; at least half as much again, so that a slowly growing need does not copy forever.
void grow(Memory& memory, int64_t bytes) {
    const int64_t size = static_cast<int64_t>(memory.size());
    if (size < bytes) memory = Memory(static_cast<size_t>(std::max(bytes, size + size / 2)));
}

}  // namespace

Model::Model(std::shared_ptr<ThreadPool> pool, Isa isa, Dtype activations)
    : threads_(std::move(pool)),
      isa_(isa),
      activations_(activations),
      rows_(row_kernels_for(isa)),
      linear_(linear_kernels_for(isa)),
      attention_(attention_kernels_for(isa)),
      store_(kv_store_kernels_for(isa)),
      sampling_(sampling_kernels_for(isa)),
      adapter_(adapter_kernels_for(isa)),
      scratch_(static_cast<size_t>(threads_->size())),
      sampler_scratch_(static_cast<size_t>(threads_->size())),
      phase_(static_cast<size_t>(threads_->size() * kCounterSpace)) {}

// --- one step -------------------------------------------------------------------------------------------

void Model::check(const Batch& b, const int32_t* copies, int64_t num_copies, const Entries& entries,
                  const HiddenRows& hidden) const {
    if (b.rows < 1 || b.segments < 1 || b.starts[0] != 0 || b.starts[b.segments] != b.rows)
        refuse("starts do not cover the rows");
    for (int64_t s = 0; s < b.segments; ++s)
        if (b.starts[s + 1] <= b.starts[s]) refuse("starts do not rise");
    int64_t pages = kv_->num_pages();
    int64_t vocab = head_.weight->matrix.n;
    for (const Op& op : ops_)
        if (const EmbedOp* embed = std::get_if<EmbedOp>(&op)) vocab = std::min(vocab, embed->vocab);
    within("token_ids", b.token_ids, b.rows, 0, vocab);
    within("positions", b.positions, b.rows, 0, max_positions_);
    within("logical", b.logical, b.rows, 0, b.table_width * kPageSize);
    within("page_tables", b.page_tables, b.segments * b.table_width, 0, pages);
    within("page_copies", copies, num_copies * 2, 0, pages);
    within("logit_rows.rows", entries.rows, entries.count, 0, b.rows);
    within("hidden_rows", hidden.rows, hidden.count, 0, b.rows);
    for (int64_t i = 1; i < hidden.count; ++i)
        if (hidden.rows[i] <= hidden.rows[i - 1]) refuse("hidden_rows do not rise");
    for (int64_t s = 0; s < b.segments; ++s) {
        const int32_t slot = b.adapter_slots[s];
        if (slot < -1 || slot >= static_cast<int64_t>(tables_.size()) || (slot >= 0 && !tables_[static_cast<size_t>(slot)]))
            refuse("adapter_slots has the value " + number(slot) + ", where no adapter is bound");
    }
    for (int64_t i = 0; i < b.rows; ++i) {
        if (b.slots[i] < -1 || b.slots[i] >= pages * kPageSize)
            refuse("slots has the value " + number(b.slots[i]) + ", outside [-1, " + number(pages * kPageSize) + ")");
        if (b.parents[i] < -1 || b.parents[i] >= i)
            refuse("parents of row " + number(i) + " is " + number(b.parents[i]) + ", which is not an earlier row or -1");
    }
}

void Model::reserve(int64_t rows) {
    if (rows <= capacity_) return;
    // Growing in jumps keeps steady traffic from mapping memory.
    const int64_t capacity = std::max(rows, std::min<int64_t>(capacity_ * 2, 512));
    for (Activation& a : buffers_) a.memory = Memory(static_cast<size_t>(capacity * a.row_bytes() + kAlign));
    int64_t values = 0, scales = 0, sums = 0, gathered = 0, hidden = 0;
    auto room = [&](const PackedMatrix& m, int64_t most) {
        if (!is_quantized(m)) return;
        values = std::max(values, most * quantized_stride(m));
        scales = std::max(scales, most * 4);
        sums = std::max(sums, most * quantized_groups(m) * 4);
    };
    for (const Op& op : ops_)
        if (const LinearOp* linear = std::get_if<LinearOp>(&op)) {
            room(linear->weight->matrix, capacity);
        } else if (const ExpertsOp* experts = std::get_if<ExpertsOp>(&op)) {
            const int64_t members = capacity * experts->top_k;
            room(experts->gate_up[0]->matrix, members);
            room(experts->down[0]->matrix, members);
            gathered = std::max(gathered, members * buffer(experts->source).row_bytes());
            hidden = std::max(hidden, members * experts->hidden_stride() * item_bytes(activations_));
            experts_.reserve(members, static_cast<int64_t>(experts->down.size()));
            if (static_cast<int64_t>(expert_rows_.size()) < members) {
                expert_rows_.resize(static_cast<size_t>(members));
                expert_weights_.resize(static_cast<size_t>(members));
            }
        }
    room(head_.weight->matrix, kTileRows);
    if (values) {
        grow(quantized_, values + kAlign);
        grow(quantized_scales_, scales);
        grow(quantized_sums_, sums + kAlign);
    }
    if (gathered) {
        grow(gathered_, gathered + kAlign);
        grow(hidden_, hidden + kAlign);
    }
    grow(tile_source_, kTileRows * buffer(head_.source).row_bytes() + kAlign);
    for (SamplerScratch& scratch : sampler_scratch_) scratch.reserve(vocab());
    // Last: where memory runs out on the way, the next step asks for it again.
    capacity_ = capacity;
}

void Model::plan(const Batch& batch, const HiddenRows& hidden) {
    int64_t bytes = 0;
    auto build = [&](AttentionPlan& plan, const Batch& rows, size_t shape) {
        plan.build(rows, *kv_, plan_shapes_[shape], threads_->size());
        bytes = std::max(bytes, plan.scratch_bytes());
    };
    // All plans of the whole batch, used or not: they are what checks it.
    for (size_t i = 0; i < plans_.size(); ++i) build(*plans_[i], batch, i);
    // The batch is legal. From here on the last step's activations are forgotten, until this one has begun.
    num_rows_ = 0;
    make_tiles();
    wanted_rows_.clear();
    std::set_union(logit_rows_.begin(), logit_rows_.end(), hidden.rows, hidden.rows + hidden.count,
                   std::back_inserter(wanted_rows_));
    if (tail_begin_ < ops_.size()) tail_.choose(batch, wanted_rows_);
    if (tail_.cut())
        for (size_t i = tail_begin_; i < ops_.size(); ++i)
            if (const AttentionOp* op = std::get_if<AttentionOp>(&ops_[i])) {
                const size_t shape = static_cast<size_t>(op->plan);
                build(*tail_plans_[shape], tail_.batch(), shape);
            }
    for (Memory& memory : scratch_) grow(memory, bytes);
    plan_adapters(batch);
}

void Model::plan_adapters(const Batch& batch) {
    const int64_t num_slots = static_cast<int64_t>(tables_.size());
    std::vector<int32_t>& slots = rows_plan_.slots;
    slots.assign(static_cast<size_t>(batch.rows), -1);
    for (int64_t s = 0; s < batch.segments; ++s)
        std::fill(slots.begin() + batch.starts[s], slots.begin() + batch.starts[s + 1], batch.adapter_slots[s]);
    rows_plan_.build(num_slots);
    tail_plan_.active = false;
    head_plans_.clear();
    if (!rows_plan_.active) return;
    if (tail_.cut()) {
        tail_plan_.slots.clear();
        for (int32_t row : tail_.rows()) tail_plan_.slots.push_back(slots[static_cast<size_t>(row)]);
        tail_plan_.build(num_slots);
    }
    int64_t ranks = 0;
    bool head = false;
    for (int64_t i = 0; i < rows_plan_.groups.count(); ++i) {
        const BoundAdapter& adapter = *adapters_[static_cast<size_t>(rows_plan_.groups.group(i).key)];
        ranks = std::max(ranks, adapter.most_ranks());
        head = head || adapter.updates()[num_ops()].count;
    }
    const size_t count = logit_rows_.size();
    for (size_t tile = 0; head && tile < count; tile += kTileRows) {
        AdapterPlan& plan = head_plans_.emplace_back();
        for (size_t i = tile; i < std::min<size_t>(count, tile + kTileRows); ++i)
            plan.slots.push_back(slots[static_cast<size_t>(logit_rows_[i])]);
        plan.build(num_slots);
    }
    shrunk_stride_ = (ranks + kLanes - 1) / kLanes * kLanes;
    grow(shrunk_, std::max<int64_t>(batch.rows, kTileRows) * shrunk_stride_ * 4);
}

void Model::make_tiles() {
    const Entries& e = *entries_;
    entry_order_.resize(static_cast<size_t>(e.count));
    std::iota(entry_order_.begin(), entry_order_.end(), 0);
    if (!std::is_sorted(e.rows, e.rows + e.count))
        std::stable_sort(entry_order_.begin(), entry_order_.end(),
                         [&](int64_t a, int64_t b) { return e.rows[a] < e.rows[b]; });
    logit_rows_.clear();
    row_starts_.clear();
    for (int64_t i = 0; i < e.count; ++i) {
        int32_t row = e.rows[entry_order_[static_cast<size_t>(i)]];
        if (logit_rows_.empty() || logit_rows_.back() != row) {
            logit_rows_.push_back(row);
            row_starts_.push_back(i);
        }
    }
    row_starts_.push_back(e.count);
    int64_t most = std::min<int64_t>(kTileRows, static_cast<int64_t>(logit_rows_.size()));
    grow(logits_, most * ((vocab() + 63) / 64 * 64) * 4 + kAlign);
}

void Model::step(const Batch& batch, const int32_t* copies, int64_t num_copies, Entries& entries,
                 const HiddenRows& hidden) {
    if (!finished_) refuse("the model is not finished");
    check(batch, copies, num_copies, entries, hidden);
    double start = profiling_ ? seconds_now() : 0;
    batch_ = &batch;
    entries_ = &entries;
    plan(batch, hidden);
    reserve(batch.rows);
    size_t tiles = (logit_rows_.size() + kTileRows - 1) / kTileRows;
    // At most two phases an op (experts: five), four a tile, one to drop rows, and one more a product with adapters.
    size_t phases = ops_.size() * 2 + num_experts_ops_ * 3 + tiles * 4 + 1;
    if (rows_plan_.active) phases += ops_.size() + tiles;
    if (counters_.size() < phases) counters_ = std::vector<WorkCounter>(phases * 2);
    for (size_t i = 0; i < phases; ++i) counters_[i].reset();
    std::fill(phase_.begin(), phase_.end(), 0);
    if (profiling_) stamps_.resize(static_cast<size_t>(threads_->size()) * (ops_.size() + 2));
    // Nothing below allocates: a step that runs out of memory has written nothing.
    num_rows_ = batch.rows;
    copy_pages(*kv_, copies, num_copies);
    if (profiling_) op_seconds_[ops_.size() + 1] += seconds_now() - start;
    threads_->run([this](int thread) noexcept { walk(thread); });
    if (profiling_) add_seconds();
    copy_hidden(hidden);
    entries_ = nullptr;
    batch_ = nullptr;
}

template <class Work>
void Model::phase(int thread, int64_t count, int64_t parts, Work&& work) {
    WorkCounter& counter = counters_[static_cast<size_t>(phase_[static_cast<size_t>(thread * kCounterSpace)]++)];
    int64_t begin, end;
    while (counter.take(thread, count, parts, begin, end)) work(begin, end);
    threads_->barrier();
}

void Model::walk(int thread) {
    double* stamp = profiling_ ? stamps_.data() + static_cast<size_t>(thread) * (ops_.size() + 2) : nullptr;
    if (stamp) *stamp++ = seconds_now();
    int64_t rows = batch_->rows;
    for (size_t i = 0; i < ops_.size(); ++i) {
        if (i == tail_begin_ && tail_.cut()) {
            compact(thread);
            rows = tail_.batch().rows;
        }
        if (rows) std::visit([&](const auto& op) { run(op, rows, thread); }, ops_[i]);
        if (stamp) *stamp++ = seconds_now();
    }
    run_head(thread);
    if (stamp) *stamp = seconds_now();
}

// An op is over when the first thread leaves it: others may be late to wake up, and do less of the next one.
void Model::add_seconds() {
    const size_t count = ops_.size() + 2;
    double last = 0;
    for (size_t i = 0; i < count; ++i) {
        double first = stamps_[i];
        for (size_t thread = 1; thread * count < stamps_.size(); ++thread)
            first = std::min(first, stamps_[thread * count + i]);
        if (i) op_seconds_[i - 1] += first - last;
        last = first;
    }
}

// The rows that are kept move to the front.
void Model::compact(int thread) {
    const std::vector<int32_t>& kept = tail_.rows();
    phase(thread, static_cast<int64_t>(carried_.size()), kOneByOne, [&](int64_t index, int64_t) {
        Activation& from = buffer(carried_[static_cast<size_t>(index)]);
        uint8_t* bytes = from.memory.data();
        for (size_t i = 0; i < kept.size(); ++i)
            if (kept[i] != static_cast<int32_t>(i))
                std::memcpy(bytes + static_cast<int64_t>(i) * from.row_bytes(), bytes + kept[i] * from.row_bytes(),
                            static_cast<size_t>(from.row_bytes()));
    });
}

void Model::run(const EmbedOp& op, int64_t rows, int thread) {
    Activation& out = buffer(op.out);
    int64_t item = op.dtype == TableDtype::f32 ? 4 : 2;
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* to = out.f32() + row * out.stride;
            int64_t token = batch_->token_ids[row];
            if (op.packed) {
                unpack_row(op.packed->matrix, token, to);
            } else {
                rows_.widen(op.table.data() + token * out.width * item, op.dtype, out.width,
                            activations_ == Dtype::bf16, to);
            }
            if (op.scale != 1.0f)
                for (int64_t i = 0; i < out.width; ++i) to[i] *= op.scale;
            if (rows_plan_.active) add_embedding(row, token, out.width, to);
        }
    });
}

// What the adapter of a row adds to the embedding of its token.
void Model::add_embedding(int64_t row, int64_t token, int64_t width, float* to) {
    const int32_t slot = rows_plan_.slots[static_cast<size_t>(row)];
    if (slot < 0) return;
    const BoundAdapter::Embedding& e = adapters_[static_cast<size_t>(slot)]->embedding;
    if (!e.rank) return;
    const uint8_t* a = e.a[static_cast<size_t>(token / e.rows_per_chunk)] +
                       token % e.rows_per_chunk * e.rank * item_bytes(activations_);
    adapter_.embed(a, e.b.data(), activations_, e.rank, e.scale, width, to);
}

void Model::run(const NormOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    RMSNormCall call{source.f32(), source.stride, nullptr, 0, op.weight->data(), out.memory.data(), out.stride,
                     out.dtype, source.width, op.epsilon};
    if (op.add >= 0) {
        call.add = buffer(op.add).f32();
        call.add_stride = buffer(op.add).stride;
    }
    phase(thread, rows, shares(),
          [&](int64_t begin, int64_t end) { rows_.rms_norm(call, begin, end); });
}

void Model::run(const PositionsOp& op, int64_t rows, int thread) {
    Activation& out = buffer(op.out);
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* from = op.table->data() + (batch_->positions[row] + op.offset) * out.width;
            float* to = out.f32() + row * out.stride;
            for (int64_t i = 0; i < out.width; ++i) to[i] += from[i];
        }
    });
}

void Model::run(const CastOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            if (op.add >= 0) {
                const float* more = buffer(op.add).f32() + row * buffer(op.add).stride;
                float* x = source.f32() + row * source.stride;
                for (int64_t i = 0; i < source.width; ++i) x[i] += more[i];
            }
            rows_.narrow(source.f32() + row * source.stride, source.width, out.dtype,
                         out.memory.data() + row * out.row_bytes());
        }
    });
}

void Model::run(const LayerNormOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    const LayerNormCall call{source.f32(), source.stride, op.weight->data(), op.bias ? op.bias->data() : nullptr,
                             out.memory.data(), out.stride, out.dtype, source.width, op.epsilon};
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) { rows_.layer_norm(call, begin, end); });
}

// Room for rows quantised for `m`, from row `row` on.
QuantizedRows Model::quantized_for(const PackedMatrix& m, int64_t row) {
    const int64_t stride = quantized_stride(m), groups = quantized_groups(m);
    return QuantizedRows{reinterpret_cast<int8_t*>(quantized_.data()) + row * stride, stride,
                         reinterpret_cast<float*>(quantized_scales_.data()) + row,
                         reinterpret_cast<int32_t*>(quantized_sums_.data()) + row * groups, groups};
}

void Model::run(const GatherOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    const std::vector<int32_t>& order = *op.order;
    auto copy = [&](const auto* from, auto* to) {
        for (size_t i = 0; i < order.size(); ++i) to[i] = from[order[i]];
    };
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* from = source.memory.data() + row * source.row_bytes();
            uint8_t* to = out.memory.data() + row * out.row_bytes();
            if (out.dtype == Dtype::bf16) {
                copy(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to));
            } else {
                copy(reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to));
            }
        }
    });
}

// What the adapters of the rows make of the source; false where none of them updates the product.
bool Model::shrink(const LinearCall& call, AdapterRows& rows, const AdapterPlan& plan, int thread) {
    int64_t ranks = 0;
    for (int64_t i = 0; i < plan.groups.count(); ++i)
        ranks = std::max<int64_t>(ranks, rows.tables[plan.groups.group(i).key][rows.product].ranks);
    if (!ranks) return false;
    const int64_t parts = (ranks + kShrinkRanks - 1) / kShrinkRanks;
    phase(thread, static_cast<int64_t>(plan.pieces.size()) * parts, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AdapterPlan::Piece& piece = plan.pieces[static_cast<size_t>(i / parts)];
            const ProductUpdate& update = rows.tables[piece.slot][rows.product];
            const int64_t first = i % parts * kShrinkRanks;
            if (first >= update.ranks) continue;
            const ShrinkCall part{call.source, call.source_stride, activations_, call.weight->k,
                                  plan.groups.members() + piece.begin, piece.end - piece.begin, update.a + first,
                                  update.scales + first, std::min<int64_t>(kShrinkRanks, update.ranks - first),
                                  reinterpret_cast<float*>(shrunk_.data()) + first, shrunk_stride_};
            adapter_.shrink(part);
        }
    });
    return true;
}

void Model::multiply(const PackedWeight& weight, LinearCall call, int thread, int64_t product,
                     const AdapterPlan* plan) {
    const PackedMatrix& m = weight.matrix;
    AdapterRows rows{nullptr, tables_.data(), product, reinterpret_cast<const float*>(shrunk_.data()), shrunk_stride_,
                     activations_};
    if (plan && plan->active && shrink(call, rows, *plan, thread)) {
        rows.slots = plan->slots.data();
        call.adapters = &rows;
    }
    if (is_quantized(m)) {
        call.quantized = quantized_for(m, 0);
        phase(thread, call.rows, shares(), [&](int64_t begin, int64_t end) {
            linear_.quantize_rows(call.source, activations_, call.source_stride, m, call.quantized, begin, end);
        });
    }
    phase(thread, m.panels, shares(),
          [&](int64_t begin, int64_t end) { linear_.linear(call, begin, end); });
}

void Model::run(const LinearOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    LinearCall call{};
    call.weight = &op.weight->matrix;
    call.source = source.memory.data();
    call.source_stride = source.stride;
    call.rows = rows;
    call.bias = op.bias ? op.bias->data() : nullptr;
    call.out = out.memory.data();
    call.out_stride = out.stride;
    call.out_dtype = out.dtype;
    call.epilogue = op.epilogue;
    call.scale = op.scale;
    multiply(*op.weight, call, thread, op.product, op.in_tail && tail_.cut() ? &tail_plan_ : &rows_plan_);
}

void Model::run(const RouteOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    const RouteCall call{source.f32(), source.stride, out.f32(), out.stride, source.width, op.top_k, op.normalized};
    phase(thread, rows, shares(), [&](int64_t begin, int64_t end) { rows_.route(call, begin, end); });
}

void Model::group_by_expert(const ExpertsOp& op, int64_t rows) {
    const Activation& routes = buffer(op.routes);
    const float* values = reinterpret_cast<const float*>(routes.memory.data());
    auto at = [&](int64_t member, int64_t part) {
        return values[member / op.top_k * routes.stride + part * op.top_k + member % op.top_k];
    };
    experts_.build(rows * op.top_k, static_cast<int64_t>(op.down.size()),
                   [&](int64_t member) { return static_cast<int64_t>(at(member, 1)); });
    for (int64_t i = 0; i < rows * op.top_k; ++i) {
        const int64_t member = experts_.members()[i];
        expert_rows_[static_cast<size_t>(i)] = static_cast<int32_t>(member / op.top_k);
        expert_weights_[static_cast<size_t>(i)] = at(member, 0);
    }
}

// The source of each member, as the product with gate and up wants it.
void Model::gather(const ExpertsOp& op, int64_t members, int thread) {
    const Activation& source = buffer(op.source);
    const PackedMatrix& m = op.gate_up[0]->matrix;
    phase(thread, members, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint8_t* from = source.memory.data() + expert_rows_[static_cast<size_t>(i)] * source.row_bytes();
            if (is_quantized(m))
                linear_.quantize_rows(from, source.dtype, source.stride, m, quantized_for(m, i), 0, 1);
            else
                std::memcpy(gathered_.data() + i * source.row_bytes(), from, static_cast<size_t>(source.row_bytes()));
        }
    });
}

void Model::run(const ExpertsOp& op, int64_t rows, int thread) {
    const Activation& source = buffer(op.source);
    Activation& out = buffer(op.out);
    phase(thread, 1, kOneByOne, [&](int64_t, int64_t) { group_by_expert(op, rows); });
    const int64_t members = rows * op.top_k, stride = op.hidden_stride();
    gather(op, members, thread);
    auto call_for = [&](const std::vector<Weight>& weights, int64_t index, const Memory& from, int64_t from_stride) {
        const RowGroups::Group& group = experts_.group(index);
        LinearCall call{};
        call.weight = &weights[static_cast<size_t>(group.key)]->matrix;
        call.source = from.data() + group.begin * from_stride * item_bytes(activations_);
        call.source_stride = from_stride;
        if (is_quantized(*call.weight)) call.quantized = quantized_for(*call.weight, group.begin);
        call.rows = group.end - group.begin;
        return call;
    };
    // Panels of one expert after the other.
    const int64_t panels = op.gate_up[0]->matrix.panels;
    phase(thread, experts_.count() * panels, shares(), [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t index = begin / panels, first = begin % panels;
            const int64_t last = std::min(panels, first + end - begin);
            LinearCall call = call_for(op.gate_up, index, gathered_, source.stride);
            call.out = hidden_.data() + experts_.group(index).begin * stride * item_bytes(activations_);
            call.out_stride = stride;
            call.out_dtype = activations_;
            call.epilogue = op.epilogue;
            linear_.linear(call, first, last);
            begin += last - first;
        }
    });
    const PackedMatrix& down = op.down[0]->matrix;
    if (is_quantized(down))
        phase(thread, members, shares(), [&](int64_t begin, int64_t end) {
            linear_.quantize_rows(hidden_.data(), activations_, stride, down, quantized_for(down, 0), begin, end);
        });
    // A thread adds all experts to its columns, in their order.
    phase(thread, down.panels, shares(), [&](int64_t begin, int64_t end) {
        for (int64_t index = 0; index < experts_.count(); ++index) {
            LinearCall call = call_for(op.down, index, hidden_, stride);
            const int64_t first = experts_.group(index).begin;
            call.out = out.memory.data();
            call.out_stride = out.stride;
            call.out_dtype = Dtype::f32;
            call.epilogue = Epilogue::residual;
            call.scale = 1;
            call.out_rows = expert_rows_.data() + first;
            call.out_weights = expert_weights_.data() + first;
            linear_.linear(call, begin, end);
        }
    });
}

void Model::run(const RopeOp& op, int64_t rows, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    RopeStoreCall call{};
    call.source = source.f32();
    call.source_stride = source.stride;
    call.out = out.f32();
    call.out_stride = out.stride;
    call.positions = batch_->positions;
    call.slots = batch_->slots;
    const int64_t table = op.table * max_positions_ * rotary_half_;
    call.cos = cos_.data() + table;
    call.sin = sin_.data() + table;
    call.target = kv_target(*kv_, op.layer);
    call.num_heads = op.num_heads;
    call.rotary_dim = op.rotary_dim;
    call.q_norm = op.q_norm ? op.q_norm->data() : nullptr;
    call.k_norm = op.k_norm ? op.k_norm->data() : nullptr;
    call.epsilon = op.epsilon;
    const size_t dim = static_cast<size_t>(kv_->layout.head_dim);
    call.whole_q = op.q_norm && op.q_norm->size() != dim;
    call.whole_k = op.k_norm && op.k_norm->size() != dim;
    phase(thread, rows, shares(),
          [&](int64_t begin, int64_t end) { store_.store_rows(call, begin, end); });
}

void Model::run(const AttentionOp& op, int64_t, int thread) {
    Activation &source = buffer(op.source), &out = buffer(op.out);
    const auto& plans = op.in_tail && tail_.cut() ? tail_plans_ : plans_;
    AttentionPlan& plan = *plans[static_cast<size_t>(op.plan)];
    uint8_t* scratch = scratch_[static_cast<size_t>(thread)].data();
    const int64_t count = plan.num_tasks(), turn = (threads_->size() + 1) / 2 * (thread % 2 ? -1 : 1);
    phase(thread, count, kOneByOne, [&](int64_t task, int64_t) {
        int64_t next = task + turn >= 0 && task + turn < count ? task + turn : task;
        attention_.run(plan, op.shape, task, next, source.f32(), source.stride, out.memory.data(), out.stride,
                       out.dtype, scratch);
    });
    if (!plan.num_merges()) return;
    phase(thread, plan.num_merges(), kOneByOne, [&](int64_t begin, int64_t end) {
        for (int64_t merge = begin; merge < end; ++merge)
            attention_.merge(plan, op.shape, merge, out.memory.data(), out.stride, out.dtype, scratch);
    });
}

void Model::run_head(int thread) {
    Activation& source = buffer(head_.source);
    int64_t count = static_cast<int64_t>(logit_rows_.size());
    int64_t stride = (vocab() + 63) / 64 * 64;
    for (int64_t tile = 0; tile < count; tile += kTileRows) {
        int64_t rows = std::min<int64_t>(kTileRows, count - tile);
        phase(thread, rows, shares(), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(tile_source_.data() + i * source.row_bytes(),
                            source.memory.data() + place(logit_rows_[static_cast<size_t>(tile + i)]) * source.row_bytes(),
                            static_cast<size_t>(source.row_bytes()));
        });
        LinearCall call{};
        call.weight = &head_.weight->matrix;
        call.source = tile_source_.data();
        call.source_stride = source.stride;
        call.rows = rows;
        call.out = logits_.data();
        call.out_stride = stride;
        call.out_dtype = Dtype::f32;
        call.epilogue = Epilogue::none;
        const AdapterPlan* plan = head_plans_.empty() ? nullptr : &head_plans_[static_cast<size_t>(tile / kTileRows)];
        multiply(*head_.weight, call, thread, num_ops(), plan);
        phase(thread, rows, kOneByOne, [&](int64_t begin, int64_t end) { sample_rows(begin, end, tile, thread); });
    }
}

void Model::copy_hidden(const HiddenRows& hidden) {
    Activation& source = buffer(head_.source);
    const TableDtype dtype = source.dtype == Dtype::bf16 ? TableDtype::bf16 : TableDtype::f32;
    for (int64_t i = 0; i < hidden.count; ++i)
        rows_.widen(source.memory.data() + place(hidden.rows[i]) * source.row_bytes(), dtype, source.width, false,
                    hidden.out + i * source.width);
}

void Model::sample_rows(int64_t begin, int64_t end, int64_t tile, int thread) {
    int64_t stride = (vocab() + 63) / 64 * 64;
    SamplerScratch& scratch = sampler_scratch_[static_cast<size_t>(thread)];
    for (int64_t i = begin; i < end; ++i) {
        float* logits = reinterpret_cast<float*>(logits_.data()) + i * stride;
        finish_logits(sampling_, logits, vocab(), head_.softcap, head_.divisor);
        size_t row = static_cast<size_t>(tile + i);
        for (int64_t j = row_starts_[row]; j < row_starts_[row + 1]; ++j) {
            size_t entry = static_cast<size_t>(entry_order_[static_cast<size_t>(j)]);
            if (entries_->candidates)
                entries_->num_candidates[entry] = static_cast<int32_t>(
                    find_candidates(sampling_, logits, vocab(), entries_->samples[entry], scratch,
                                    entries_->candidates + entry * kMaxCandidates));
            else
                sample_row(sampling_, logits, vocab(), entries_->samples[entry], scratch, entries_->results[entry]);
        }
    }
}

void Model::logits(const int32_t* rows, int64_t count, float* out) {
    if (!finished_) refuse("the model is not finished");
    within("rows", rows, count, 0, num_rows_);
    for (int64_t i = 0; i < count; ++i)
        if (place(rows[i]) < 0) refuse("rows names row " + number(rows[i]) + ", for which no logits were asked");
    Activation& source = buffer(head_.source);
    if (counters_.size() < 4) counters_ = std::vector<WorkCounter>(4);
    grow(logits_, ((vocab() + 63) / 64 * 64) * 4 + kAlign);
    for (int64_t i = 0; i < count; ++i) {
        for (size_t c = 0; c < 4; ++c) counters_[c].reset();
        std::fill(phase_.begin(), phase_.end(), 0);
        LinearCall call{};
        call.weight = &head_.weight->matrix;
        call.source = source.memory.data() + place(rows[i]) * source.row_bytes();
        call.source_stride = source.stride;
        call.rows = 1;
        call.out = logits_.data();
        call.out_stride = vocab();
        call.out_dtype = Dtype::f32;
        call.epilogue = Epilogue::none;
        AdapterPlan plan;
        plan.slots.assign(1, rows_plan_.active ? rows_plan_.slots[static_cast<size_t>(rows[i])] : -1);
        plan.build(static_cast<int64_t>(tables_.size()));
        threads_->run([&](int thread) { multiply(*head_.weight, call, thread, num_ops(), &plan); });
        float* row = reinterpret_cast<float*>(logits_.data());
        finish_logits(sampling_, row, vocab(), head_.softcap, head_.divisor);
        std::memcpy(out + i * vocab(), row, static_cast<size_t>(vocab()) * 4);
    }
}

}  // namespace tokenloom
