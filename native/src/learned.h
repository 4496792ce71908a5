// The default cache policy's arithmetic for single tokens, on the arrays of `moei_core.cache.policies.learned` and to
// the same bits: what each array means, and why sums may be taken in any order, is said there.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace moei {

inline constexpr int64_t kFeatures = 9;

// Shapes in the order of the indices; all contiguous.
struct MixtureArrays {
    int64_t layers, width, batch;
    // The fit looks at every `step`-th expert of a layer, `sampled` in all.
    int64_t step, sampled;
    // [layers, width]
    float *values, *absence, *candidates;
    // [layers, batch + 1, kFeatures, width]
    float* batches;
    // [layers, 2 width, width]
    float* follows;
    // [layers, 2 width]
    float *seen, *trust, *source_trace;
    // [layers, kFeatures, sampled], [layers, kFeatures, kFeatures], [layers, kFeatures]
    double *feature_trace, *gram, *moment;
    // [layers, kFeatures], [layers]
    float *weights, *ranking, *floor;
    double *total, *delay;
    // [kFeatures], [kFeatures]: what is left of each feature after a token, and what a use adds to it.
    float *keep, *gain;
    // [batch + 1]
    float* powers;
    double* forget;
};

// slow: what a token leaves of the total. horizon_share: 1 - the discount of a token. doubt: what an affinity's trust
// is short of 1, per trust. least_share: of the slowest frequency, below which no value falls. faded: a source's trace
// from which it still teaches. nothing: below it, a feature is 0.
struct MixtureConstants {
    double slow, horizon_share, doubt, least_share;
    float faded, nothing;
};

class LearnedMixture {
public:
    LearnedMixture(const MixtureArrays& arrays, const MixtureConstants& constants);

    // A forward pass starts. discount: of the first layer. full: tokens of a batch that are learned from.
    void begin_pass(double discount, int64_t full);
    // The next access does not follow from the one before it.
    void break_off() { previous_.clear(); }
    // A token has used `experts`, distinct, of layer number `i`.
    void account(int64_t i, const std::vector<int64_t>& experts);
    // Learn from the tokens that layer `i` has collected.
    void learn(int64_t i);

    void insert(int64_t i, int64_t expert);
    void remove(int64_t i, int64_t expert);
    // Python has changed values of layer `i`.
    void changed(int64_t i) { least_[i] = kUnknown; }
    // Where the least candidate is, [layers, width]; the first of equals, -1 if there is none.
    int64_t least();
    // Keep it out of `least` until its number is put back.
    float hide(int64_t at) { return exchange(at, kAbsent); }
    float exchange(int64_t at, float value);

    const MixtureArrays arrays;

private:
    static constexpr int64_t kUnknown = -2;
    static const float kAbsent;

    void learn_fit(int64_t i, int64_t count);
    void learn_affinities(int64_t i, int64_t count);
    void value(int64_t i, const float* features);

    const MixtureConstants constants_;
    int64_t full_;
    std::vector<int64_t> previous_, filled_, least_;
    // By layer and token of the batch: the experts used, then those of the layer before, these shifted by width.
    std::vector<std::vector<int64_t>> sources_;
    std::vector<int64_t> own_;
    // Memory of the steps of learning.
    std::vector<double> rows_, later_uses_, sums_;
    std::vector<float> past_, added_;
    std::vector<uint64_t> source_tokens_;
    std::vector<int64_t> near_, used_;
};

}  // namespace moei
