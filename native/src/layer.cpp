#include "layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "matmul_parts.h"

namespace moei {
namespace {

template <typename T>
T* room(std::vector<T>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
    return buffer.data();
}

void norm_row(const Norm& norm, Format type, const uint8_t* x, int64_t count, uint8_t* out, LayerScratch& scratch) {
    float* const row = room(scratch.wide, count);
    widen(type, x, count, row);
    rms_norm(row, norm.weight, count, norm.eps, row);
    narrow(type, row, count, out);
}

// sum += x
void add_row(Format type, const uint8_t* x, int64_t count, uint8_t* sum, LayerScratch& scratch) {
    float *const row = room(scratch.wide, 2 * count), *const other = row + count;
    widen(type, sum, count, row);
    widen(type, x, count, other);
    for (int64_t i = 0; i < count; ++i) row[i] += other[i];
    narrow(type, row, count, sum);
}

// As torch.topk on a processor: the same algorithms of the standard library in the same comparison, so that of equal
// numbers the same are chosen.
void largest(std::vector<std::pair<float, int64_t>>& all, int64_t k, bool sorted) {
    const auto before = [](const auto& a, const auto& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    if (k * 64 <= static_cast<int64_t>(all.size())) {
        std::partial_sort(all.begin(), all.begin() + k, all.end(), before);
        return;
    }
    std::nth_element(all.begin(), all.begin() + k - 1, all.end(), before);
    if (sorted) std::sort(all.begin(), all.begin() + k - 1, before);
}

// The outputs of some experts for one token: [count, hidden].
float* one_token(const FfnLayout& layout, int64_t count, const ExpertParts* parts, Format type, const uint8_t* x,
                 LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    float *const input = room(scratch.wide, layout.hidden), *const outputs = room(scratch.outputs, count * layout.hidden);
    int64_t *const offsets = room(scratch.offsets, count + 1), *const rows = room(scratch.rows, count);
    std::iota(offsets, offsets + count + 1, int64_t{0});
    std::fill(rows, rows + count, int64_t{0});
    widen(type, x, layout.hidden, input);
    moe_ffn(layout, {count, 1, parts, offsets, rows, input, outputs}, pool, workspace);
    return outputs;
}

}  // namespace

void route(const RouterLayout& router, Format type, const uint8_t* x, uint8_t* logits, int64_t* experts, float* weights,
           LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    const int64_t count = router.weights.matrix.rows, k = router.top_k;
    if (router.wide && type != Format::F32) {
        const int64_t hidden = router.weights.matrix.cols;
        float* const wide = room(scratch.wide, hidden);
        widen(type, x, hidden, wide);
        linear(router.weights, Format::F32, reinterpret_cast<const uint8_t*>(wide), 1, logits, pool, workspace);
    } else {
        linear(router.weights, type, x, 1, logits, pool, workspace);
    }
    const DefaultFloatingPoint guard;
    float* const scores = room(scratch.wide, count);
    widen(router.wide ? Format::F32 : type, logits, count, scores);
    const float factor = router.late ? 1.0f : kernels().softmax(scores, count, 1.0f, nullptr);
    scratch.ranking.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) scratch.ranking[i] = {scores[i] * factor, i};
    largest(scratch.ranking, k, router.sorted);
    if (router.late) {
        for (int64_t i = 0; i < k; ++i) scores[i] = scratch.ranking[i].first;
        const float share = kernels().softmax(scores, k, 1.0f, nullptr);
        for (int64_t i = 0; i < k; ++i) scratch.ranking[i].first = scores[i] * share;
    }
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += scratch.ranking[i].first;
    for (int64_t i = 0; i < k; ++i) {
        experts[i] = scratch.ranking[i].second;
        weights[i] = (router.normed ? scratch.ranking[i].first / sum : scratch.ranking[i].first) * router.scale;
    }
    if (!router.rounded || type == Format::F32) return;
    uint8_t* const narrowed = room(scratch.mixed, k * format_info(type).block_nbytes);
    narrow(type, weights, k, narrowed);
    widen(type, narrowed, k, weights);
}

void route_early(const Norm* norm, const RouterLayout& router, Format type, const uint8_t* x, int64_t* experts,
                 LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    const int64_t hidden = router.weights.matrix.cols;
    if (norm) {
        const DefaultFloatingPoint guard;
        uint8_t* const normed = room(scratch.mixed, row_nbytes(type, hidden));
        norm_row(*norm, type, x, hidden, normed, scratch);
        x = normed;
    }
    uint8_t* const logits = room(scratch.logits, row_nbytes(router.wide ? Format::F32 : type, router.weights.matrix.rows));
    route(router, type, x, logits, experts, room(scratch.weight, router.top_k), scratch, pool, workspace);
}

void moe_token(const FfnLayout& layout, int64_t count, const ExpertParts* parts, const float* weights, Format type,
               const uint8_t* x, uint8_t* out, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    float* const outputs = one_token(layout, count, parts, type, x, scratch, pool, workspace);
    weigh_rows(count, layout.hidden, outputs, weights, type, out, scratch);
}

void expert_rows(const FfnLayout& layout, int64_t count, const ExpertParts* parts, const int64_t* rows, Format type,
                 const uint8_t* x, float* outputs, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    const float* const made = one_token(layout, count, parts, type, x, scratch, pool, workspace);
    for (int64_t e = 0; e < count; ++e)
        std::copy_n(made + e * layout.hidden, layout.hidden, outputs + rows[e] * layout.hidden);
}

void weigh_rows(int64_t count, int64_t hidden, const float* outputs, const float* weights, Format type, uint8_t* out,
                LayerScratch& scratch) {
    const DefaultFloatingPoint guard;
    float* const sum = room(scratch.wide, hidden);
    for (int64_t i = 0; i < hidden; ++i) sum[i] = outputs[i] * weights[0];
    for (int64_t e = 1; e < count; ++e) {
        const float* const row = outputs + e * hidden;
        for (int64_t i = 0; i < hidden; ++i) sum[i] += row[i] * weights[e];
    }
    narrow(type, sum, hidden, out);
}

void route_token(const LayerLayout& layout, const AttentionCall& attention, uint8_t* normed, int64_t* experts, float* weights,
                 LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    const Format type = attention.type;
    const int64_t hidden = std::visit([](const auto& own) { return own.hidden; }, layout.attention), nbytes = row_nbytes(type, hidden);
    const DefaultFloatingPoint guard;
    uint8_t* const mixed = room(scratch.mixed, nbytes);
    AttentionCall inner = attention;
    norm_row(layout.input, type, attention.x, hidden, normed, scratch);
    inner.x = normed;
    inner.out = mixed;
    std::visit([&](const auto& own) { attend(own, inner, pool, workspace); }, layout.attention);
    std::copy(attention.x, attention.x + nbytes, attention.out);
    add_row(type, mixed, hidden, attention.out, scratch);
    norm_row(layout.behind, type, attention.out, hidden, normed, scratch);
    uint8_t* const logits = room(scratch.logits, row_nbytes(layout.router.wide ? Format::F32 : type, layout.router.weights.matrix.rows));
    route(layout.router, type, normed, logits, experts, weights, scratch, pool, workspace);
}

void share_token(const SharedExpert& shared, Format type, const uint8_t* normed, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    uint8_t* const out = room(scratch.shared, row_nbytes(type, shared.layout.hidden));
    const float weight = 1.0f;
    moe_token(shared.layout, 1, &shared.parts, &weight, type, normed, out, scratch, pool, workspace);
}

void add_experts(const ExpertTable& table, int64_t top_k, const int64_t* experts, const float* weights, Format type,
                 const uint8_t* normed, bool shared, uint8_t* sum, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace) {
    const int64_t hidden = table.layout.hidden;
    int64_t* const order = room(scratch.order, top_k);
    std::iota(order, order + top_k, int64_t{0});
    std::sort(order, order + top_k, [&](int64_t a, int64_t b) { return experts[a] < experts[b]; });
    ExpertParts* const parts = room(scratch.parts, top_k);
    float* const weight = room(scratch.weight, top_k);
    for (int64_t i = 0; i < top_k; ++i) {
        parts[i] = table.parts[static_cast<size_t>(experts[order[i]])];
        weight[i] = weights[order[i]];
    }
    uint8_t* const out = room(scratch.mixed, row_nbytes(type, hidden));
    moe_token(table.layout, top_k, parts, weight, type, normed, out, scratch, pool, workspace);
    const DefaultFloatingPoint guard;
    if (shared) add_row(type, scratch.shared.data(), hidden, out, scratch);
    add_row(type, out, hidden, sum, scratch);
}

}  // namespace moei
