// Building a model: records of the program, checked against each other.
#include <algorithm>

#include "model.hpp"
#include "refuse.hpp"

namespace tokenloom {

int Model::add_buffer(int64_t width, bool activation) {
    if (width < 1 || width > (int64_t{1} << 24)) refuse("buffer width " + number(width));
    // Room for vectors that read past the end of the last row's width.
    int64_t stride = (width + 63) / 64 * 64;
    buffers_.push_back({width, stride, activation ? activations_ : Dtype::f32, Memory()});
    return static_cast<int>(buffers_.size()) - 1;
}

void Model::set_kv(KVFormat format, int layers, int heads, int dim, int64_t frames, int64_t frame_bytes,
                   int64_t pages_per_frame, const Model* frames_of) {
    if (layers < 1 || heads < 1 || dim < 2 || dim % 2 || dim > 1024 || frames < 1 || pages_per_frame < 1)
        refuse("KV pool of " + number(layers) + " layers, " + number(heads) + " heads of " + number(dim) +
               " dimensions (even, at most 1024), " + number(frames) + " frames of " + number(pages_per_frame) +
               " pages");
    KVLayout layout(format, layers, heads, dim);
    if (layout.page_bytes() * pages_per_frame > frame_bytes || frame_bytes % 64)
        refuse(number(pages_per_frame) + " pages of " + number(layout.page_bytes()) + " bytes do not fit a frame of " +
               number(frame_bytes) + " bytes (a multiple of 64)");
    if (frames_of) {
        if (!frames_of->kv_ || frames_of->kv_->num_frames != frames || frames_of->kv_->frame_bytes != frame_bytes)
            refuse("the other model has no " + number(frames) + " frames of " + number(frame_bytes) +
                   " bytes to share");
        kv_memory_ = frames_of->kv_memory_;
    } else {
        kv_memory_ = std::make_shared<Memory>(static_cast<size_t>(frames * frame_bytes));
    }
    kv_ = std::make_unique<KVPool>(KVPool{layout, kv_memory_->data(), frames, frame_bytes, pages_per_frame});
}

void Model::set_rope(std::vector<float> cos, std::vector<float> sin, int64_t positions, int64_t half, int64_t tables) {
    if (positions < 1 || half < 0 || tables < 1 || static_cast<int64_t>(cos.size()) != tables * positions * half || sin.size() != cos.size())
        refuse("rope tables do not have the shape [tables * positions, rotary_dim / 2]");
    cos_ = std::move(cos);
    sin_ = std::move(sin);
    max_positions_ = positions;
    rotary_half_ = half;
    num_tables_ = tables;
}

void Model::add_embed_packed(Weight weight, int out, float scale) {
    if (buffers_.at(static_cast<size_t>(out)).width != weight->matrix.k || buffer(out).dtype != Dtype::f32)
        refuse("embedding: the output must be fp32 and as wide as the table");
    int64_t vocab = weight->matrix.n;
    ops_.push_back(EmbedOp{std::move(weight), {}, TableDtype::f32, vocab, out, scale});
}

void Model::add_embed_table(std::vector<uint8_t> table, TableDtype dtype, int64_t vocab, int out, float scale) {
    int64_t width = buffers_.at(static_cast<size_t>(out)).width;
    int64_t item = dtype == TableDtype::f32 ? 4 : 2;
    if (vocab < 1 || static_cast<int64_t>(table.size()) != vocab * width * item || buffer(out).dtype != Dtype::f32)
        refuse("embedding: the output must be fp32 and as wide as the table");
    ops_.push_back(EmbedOp{nullptr, std::move(table), dtype, vocab, out, scale});
}

void Model::add_norm(int source, int add, Vector weight, int out, float epsilon) {
    int64_t width = buffers_.at(static_cast<size_t>(source)).width;
    bool fits = buffers_.at(static_cast<size_t>(out)).width == width && static_cast<int64_t>(weight->size()) == width &&
                buffer(source).dtype == Dtype::f32;
    if (add >= 0)
        fits = fits && buffers_.at(static_cast<size_t>(add)).width == width && buffer(add).dtype == Dtype::f32;
    if (!fits) refuse("rms_norm: widths differ, or the source is not fp32");
    ops_.push_back(NormOp{source, add, out, std::move(weight), epsilon});
}

void Model::add_positions(Vector table, int64_t offset, int out) {
    const Activation& to = buffers_.at(static_cast<size_t>(out));
    const int64_t size = static_cast<int64_t>(table->size());
    if (to.dtype != Dtype::f32 || size % to.width || offset < 0 || size / to.width < offset + max_positions_)
        refuse("positions: the table is not as wide as the buffer, or has fewer rows than there are positions");
    ops_.push_back(PositionsOp{std::move(table), offset, out});
}

void Model::add_cast(int source, int add, int out) {
    const int64_t width = buffers_.at(static_cast<size_t>(source)).width;
    bool fits = buffers_.at(static_cast<size_t>(out)).width == width && buffer(source).dtype == Dtype::f32;
    if (add >= 0) fits = fits && buffers_.at(static_cast<size_t>(add)).width == width && buffer(add).dtype == Dtype::f32;
    if (!fits) refuse("cast: widths differ, or the source is not fp32");
    ops_.push_back(CastOp{source, add, out});
}

void Model::add_layer_norm(int source, Vector weight, Vector bias, int out, float epsilon) {
    const int64_t width = buffers_.at(static_cast<size_t>(source)).width;
    if (buffers_.at(static_cast<size_t>(out)).width != width || static_cast<int64_t>(weight->size()) != width ||
        (bias && static_cast<int64_t>(bias->size()) != width) || buffer(source).dtype != Dtype::f32)
        refuse("layer_norm: widths differ, or the source is not fp32");
    ops_.push_back(LayerNormOp{source, out, std::move(weight), std::move(bias), epsilon});
}

void Model::add_linear(int source, Weight weight, int out, Vector bias, Epilogue epilogue, float scale) {
    const PackedMatrix& m = weight->matrix;
    const Activation& from = buffers_.at(static_cast<size_t>(source));
    const Activation& to = buffers_.at(static_cast<size_t>(out));
    bool float_ok = m.format == Format::bf16 ? from.dtype == Dtype::bf16
                    : m.format == Format::f32 ? from.dtype == Dtype::f32
                                              : true;
    bool fits = from.width == m.k && to.width == (is_paired(epilogue) ? m.n / 2 : m.n) && source != out &&
                (m.paired != 0) == is_paired(epilogue) &&
                (!bias || static_cast<int64_t>(bias->size()) == m.n) &&
                (epilogue != Epilogue::residual || to.dtype == Dtype::f32) && float_ok;
    if (!fits) refuse("linear [" + number(m.n) + ", " + number(m.k) + "]: shapes, formats or epilogue do not agree");
    ops_.push_back(LinearOp{source, out, std::move(weight), std::move(bias), epilogue, scale, num_ops()});
}

void Model::add_gather(int source, Order order, int out) {
    const Activation& from = buffers_.at(static_cast<size_t>(source));
    const Activation& to = buffers_.at(static_cast<size_t>(out));
    const int64_t width = from.width;
    bool fits = to.width == width && static_cast<int64_t>(order->size()) == width && source != out && from.dtype == to.dtype;
    for (int32_t index : *order) fits = fits && index >= 0 && index < width;
    if (!fits) refuse("gather: widths or formats differ, or the order names what does not exist");
    ops_.push_back(GatherOp{source, out, std::move(order)});
}

void Model::add_rope(int source, int out, int layer, int num_heads, int rotary_dim, Vector q_norm, Vector k_norm,
                     float epsilon, int table) {
    if (!kv_) refuse("rope_store before the KV pool");
    const KVLayout& kv = kv_->layout;
    int64_t dim = kv.head_dim;
    bool fits = buffers_.at(static_cast<size_t>(source)).width == (num_heads + 2 * kv.num_kv_heads) * dim &&
                buffers_.at(static_cast<size_t>(out)).width == num_heads * dim &&
                buffer(source).dtype == Dtype::f32 && buffer(out).dtype == Dtype::f32 && layer >= 0 &&
                layer < kv.num_layers && rotary_dim >= 0 && rotary_dim <= dim && rotary_dim == 2 * rotary_half_ && table >= 0 && table < num_tables_;
    // A norm is over each head, or over all heads together.
    auto norm_fits = [&](const Vector& norm, int64_t heads) {
        const int64_t size = norm ? static_cast<int64_t>(norm->size()) : dim;
        return size == dim || size == heads * dim;
    };
    fits = fits && norm_fits(q_norm, num_heads) && norm_fits(k_norm, kv.num_kv_heads);
    if (!fits) refuse("rope_store: widths, layer or rotary_dim do not agree");
    ops_.push_back(RopeOp{source, out, layer, num_heads, rotary_dim, std::move(q_norm), std::move(k_norm), epsilon, table});
}

void Model::add_attention(int source, int out, int layer, int num_heads, float scale, int window, float softcap) {
    if (!kv_) refuse("attention before the KV pool");
    const KVLayout& kv = kv_->layout;
    bool fits = buffers_.at(static_cast<size_t>(source)).width == num_heads * kv.head_dim &&
                buffers_.at(static_cast<size_t>(out)).width == num_heads * kv.head_dim && num_heads > 0 &&
                num_heads % kv.num_kv_heads == 0 && buffer(source).dtype == Dtype::f32 && layer >= 0 &&
                layer < kv.num_layers && window >= 0 && softcap >= 0;
    if (!fits) refuse("attention: widths, layer or heads do not agree");
    AttentionShape shape{num_heads, kv.num_kv_heads, kv.head_dim, scale, window, layer, softcap};
    auto found = std::find_if(plan_shapes_.begin(), plan_shapes_.end(), [&](const AttentionShape& other) {
        return other.num_heads == num_heads && other.window == window && other.softcap == softcap;
    });
    int plan = static_cast<int>(found - plan_shapes_.begin());
    if (found == plan_shapes_.end()) plan_shapes_.push_back(shape);
    ops_.push_back(AttentionOp{source, out, plan, false, shape});
}

void Model::add_route(int source, int out, int64_t top_k, bool normalized) {
    const Activation& from = buffers_.at(static_cast<size_t>(source));
    const Activation& to = buffers_.at(static_cast<size_t>(out));
    if (from.dtype != Dtype::f32 || to.dtype != Dtype::f32 || source == out || top_k < 1 || top_k > kMaxChosen ||
        top_k > from.width || from.width > kMaxExperts || to.width != 2 * top_k)
        refuse("route: " + number(top_k) + " of " + number(from.width) + " experts, or widths do not agree");
    ops_.push_back(RouteOp{source, out, top_k, normalized});
}

void Model::add_experts(int source, int routes, int out, std::vector<Weight> gate_up, std::vector<Weight> down,
                        Epilogue epilogue) {
    const Activation& from = buffers_.at(static_cast<size_t>(source));
    const Activation& chosen = buffers_.at(static_cast<size_t>(routes));
    const Activation& to = buffers_.at(static_cast<size_t>(out));
    // Numbers of experts are no longer checked once they are made: the same count must have made them.
    const bool routed = std::any_of(ops_.begin(), ops_.end(), [&](const Op& op) {
        const RouteOp* route = std::get_if<RouteOp>(&op);
        return route && route->out == routes &&
               buffer(route->source).width == static_cast<int64_t>(gate_up.size());
    });
    if (!routed || gate_up.empty() || down.size() != gate_up.size() || !is_paired(epilogue))
        refuse("experts: no choice among " + number(static_cast<int64_t>(gate_up.size())) + " of them was made");
    const PackedMatrix &inner = gate_up[0]->matrix, &outer = down[0]->matrix;
    auto alike = [](const PackedMatrix& a, const PackedMatrix& b) {
        return a.format == b.format && a.n == b.n && a.k == b.k && a.group == b.group && a.paired == b.paired;
    };
    for (size_t i = 0; i < down.size(); ++i)
        if (!alike(gate_up[i]->matrix, inner) || !alike(down[i]->matrix, outer))
            refuse("experts: weights of one layer differ in shape or format");
    auto takes = [&](const PackedMatrix& m) {
        return is_quantized(m) || (m.format == Format::bf16) == (activations_ == Dtype::bf16);
    };
    if (from.width != inner.k || from.dtype != activations_ || !inner.paired || outer.paired || outer.k != inner.n / 2 ||
        inner.n % 2 || to.width != outer.n || to.dtype != Dtype::f32 || source == out || !takes(inner) || !takes(outer))
        refuse("experts [" + number(inner.n) + ", " + number(inner.k) + "]: shapes or formats do not agree");
    ++num_experts_ops_;
    const int64_t hidden = outer.k, top_k = chosen.width / 2;
    ops_.push_back(ExpertsOp{source, routes, out, std::move(gate_up), std::move(down), epilogue, top_k, hidden});
}

void Model::set_head(int source, Weight weight, float softcap, float divisor) {
    const PackedMatrix& m = weight->matrix;
    const Activation& from = buffers_.at(static_cast<size_t>(source));
    if (from.width != m.k || m.paired || from.dtype != activations_ ||
        (m.format == Format::bf16 && activations_ != Dtype::bf16) ||
        (m.format == Format::f32 && activations_ != Dtype::f32))
        refuse("head [" + number(m.n) + ", " + number(m.k) + "]: shape or format does not agree");
    if (m.n > kMaxVocabulary)
        refuse("a vocabulary of " + number(m.n) + " tokens: the sampler counts up to " + number(kMaxVocabulary));
    if (!(divisor > 0)) refuse("head: the divisor must be above 0");
    head_ = Head{source, std::move(weight), softcap, divisor};
}

void Model::finish() {
    if (!kv_ || !max_positions_ || !head_.weight || ops_.empty()) refuse("the model lacks a part");
    for (size_t i = 0; i < plan_shapes_.size(); ++i) {
        plans_.push_back(std::make_unique<AttentionPlan>());
        tail_plans_.push_back(std::make_unique<AttentionPlan>());
    }
    find_tail();
    op_seconds_.assign(ops_.size() + 2, 0.0);
    finished_ = true;
}

void Model::find_tail() {
    for (size_t i = 0; i < ops_.size(); ++i)
        if (std::holds_alternative<RopeOp>(ops_[i])) tail_begin_ = i + 1;
    std::vector<bool> filled(buffers_.size());
    auto read = [&](int index) {
        if (index >= 0 && !filled[static_cast<size_t>(index)] &&
            std::find(carried_.begin(), carried_.end(), index) == carried_.end())
            carried_.push_back(index);
    };
    auto fill = [&](int index) { filled[static_cast<size_t>(index)] = true; };
    for (size_t i = tail_begin_; i < ops_.size(); ++i) {
        if (std::holds_alternative<EmbedOp>(ops_[i]) || std::holds_alternative<PositionsOp>(ops_[i])) {
            tail_begin_ = ops_.size();  // it asks for the token ids or positions of all rows
            carried_.clear();
            break;
        }
        if (const NormOp* norm = std::get_if<NormOp>(&ops_[i])) {
            read(norm->source);
            read(norm->add);
            fill(norm->out);
        } else if (const LayerNormOp* layer_norm = std::get_if<LayerNormOp>(&ops_[i])) {
            read(layer_norm->source);
            fill(layer_norm->out);
        } else if (const CastOp* cast = std::get_if<CastOp>(&ops_[i])) {
            read(cast->source);
            read(cast->add);
            fill(cast->out);
        } else if (const GatherOp* gather = std::get_if<GatherOp>(&ops_[i])) {
            read(gather->source);
            fill(gather->out);
        } else if (LinearOp* linear = std::get_if<LinearOp>(&ops_[i])) {
            linear->in_tail = true;
            read(linear->source);
            if (linear->epilogue == Epilogue::residual) read(linear->out);
            fill(linear->out);
        } else if (const RouteOp* route = std::get_if<RouteOp>(&ops_[i])) {
            read(route->source);
            fill(route->out);
        } else if (const ExpertsOp* experts = std::get_if<ExpertsOp>(&ops_[i])) {
            read(experts->source);
            read(experts->routes);
            read(experts->out);
        } else if (AttentionOp* attention = std::get_if<AttentionOp>(&ops_[i])) {
            attention->in_tail = true;
            read(attention->source);
            fill(attention->out);
        }
    }
    read(head_.source);
}

std::string Model::op_name(int64_t index) const {
    static const char* const names[] = {"embed", "rms_norm", "linear", "rope_store", "attention",
                                        "embed_positions", "cast", "layer_norm", "route", "experts", "gather"};
    int64_t ops = num_ops();
    if (index == ops) return "head";
    if (index == ops + 1) return "plan";
    return names[ops_.at(static_cast<size_t>(index)).index()];
}

}  // namespace tokenloom
