// One token's attention over latents (DeepSeek's): the cache keeps, for each token, one compressed vector from which all
// heads' keys and values would be expanded, and one turned vector that all keys share.
#pragma once

#include <cstdint>
#include <string_view>

#include "dense.h"

namespace moei {

// How the values that turn with the position are paired and left, and how cosine and sine are given.
enum class Turn {
    Halves,            // the first half with the second; cosines and sines [rotary] of the call's type
    NeighborsToHalves, // values 2 i and 2 i + 1, which become i and rotary / 2 + i; of cosines and sines the first half counts
    Neighbors,         // values 2 i and 2 i + 1 in their places; float32 [rotary / 2, 2], cosine and sine, at `cosine`
};
Turn turn_from_name(std::string_view name);  // throws std::invalid_argument

// `rank`: values of a latent. A head's query has `nope` values that meet its key, then `rotary` that meet the turned vector;
// its value has `value`. q_a: from the hidden state to what `q` reads, through q_norm; its data null: q reads the hidden state.
// kv_a: [rank + rotary, hidden]. kv_b: for each head `nope` rows of its key, then `value` rows of its value, [.., rank]:
// floats in plain order, or Q8_0 in rows16 with nope and value multiples of 16. q (or q_a) and kv_a are of one format.
struct LatentLayout {
    int64_t hidden, heads, nope, rotary, value, rank;
    float scale;
    Turn turn;
    Weights q_a, q, kv_a, kv_b, o;
    Norm q_norm, kv_norm;
};

// As for grouped queries, with keys: latents [capacity, rank], and values: turned vectors [capacity, rotary]. Nothing is
// expanded: a query goes through its head's key rows backwards, meets the latents, and what it mixes of them goes through
// the head's value rows.
void attend(const LatentLayout& layout, const AttentionCall& call, ThreadPool& pool, Workspace& workspace);

}  // namespace moei
