// One token through a whole decoder layer: what the modules of a model compute one after the other, in one call.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "dense.h"
#include "latent_attention.h"
#include "matmul.h"

namespace moei {

// A router: softmax over all experts, the largest `top_k` of them, divided by their sum if `normed`, times `scale`;
// `late`: the largest first, then softmax over these. The weights are rounded to the activations' type if `rounded`, the
// logits unless `wide`. Unless `sorted` the chosen are in the order that torch.topk leaves when it need not sort.
struct RouterLayout {
    Weights weights;
    int64_t top_k;
    float scale;
    bool normed, rounded, wide, sorted, late;
};

// Memory that the steps below pass results in. For one call at a time.
struct LayerScratch {
    std::vector<uint8_t> mixed, logits, shared;
    std::vector<float> wide, weight, outputs;
    std::vector<ExpertParts> parts;
    std::vector<int64_t> order, offsets, rows;
    std::vector<std::pair<float, int64_t>> ranking;
};

// x: [hidden] of the float format `type`. logits: [experts] of `type` (float32 if wide), and it is these that are
// compared, as in the modules. experts, weights: [top_k]; equal ones in torch.topk's order.
void route(const RouterLayout& router, Format type, const uint8_t* x, uint8_t* logits, int64_t* experts, float* weights,
           LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// What the router of a later layer chooses for this layer's input as it is, or through `norm`, its own, for the residual
// stream: a prediction. x: [hidden] of `type`. experts: [top_k].
void route_early(const Norm* norm, const RouterLayout& router, Format type, const uint8_t* x, int64_t* experts,
                 LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// out = the outputs of `count` experts times their weights, summed in the order given. x, out: [hidden] of `type`.
void moe_token(const FfnLayout& layout, int64_t count, const ExpertParts* parts, const float* weights, Format type,
               const uint8_t* x, uint8_t* out, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// The same in two steps, for experts that come one after the other. Row rows[i] of outputs, [.., hidden], = the output of
// the i-th expert.
void expert_rows(const FfnLayout& layout, int64_t count, const ExpertParts* parts, const int64_t* rows, Format type,
                 const uint8_t* x, float* outputs, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// out = the rows of outputs, [count, hidden], times their weights, summed in order.
void weigh_rows(int64_t count, int64_t hidden, const float* outputs, const float* weights, Format type, uint8_t* out,
                LayerScratch& scratch);

// An expert that serves every token beside those that the router chooses.
struct SharedExpert {
    FfnLayout layout;
    ExpertParts parts;
};

// sum = x + attention(norm(x)); then out = sum + (experts(norm(sum)) + shared(norm(sum))).
struct LayerLayout {
    Norm input, behind;
    std::variant<AttentionLayout, LatentLayout> attention;
    RouterLayout router;
    std::optional<SharedExpert> shared;
};

// The experts of a layer, by number, all of them in memory.
struct ExpertTable {
    FfnLayout layout;
    std::vector<ExpertParts> parts;
};

// attention: its x is the layer's, its `out` is where `sum` goes. normed: [hidden], what router and experts are given.
// experts, weights: of the router. Each result of a module is rounded to the type, as if the modules had been called.
void route_token(const LayerLayout& layout, const AttentionCall& attention, uint8_t* normed, int64_t* experts, float* weights,
                 LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// What the shared expert makes of `normed`: [hidden] in `scratch.shared`.
void share_token(const SharedExpert& shared, Format type, const uint8_t* normed, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

// The rest of the layer, in place: sum += what the chosen experts make of `normed`, summed in ascending order of experts,
// with what `share_token` has made if `shared`.
void add_experts(const ExpertTable& table, int64_t top_k, const int64_t* experts, const float* weights, Format type,
                 const uint8_t* normed, bool shared, uint8_t* sum, LayerScratch& scratch, ThreadPool& pool, Workspace& workspace);

}  // namespace moei
