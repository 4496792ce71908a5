#include "learned.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

namespace moei {

namespace {

// What Python calls GRID, and sources that are learned from together.
constexpr double kGrid = 0x1p-16;
constexpr int64_t kBlock = 16;

// The features' rows, as in Python: five frequencies, the last of them slow; then what follows the layer's own experts,
// those of the layer before, and its own a few tokens back; then how lately it was used.
constexpr int64_t kSlow = 4, kOwn = 5, kBefore = 6, kOwnRecent = 7, kAge = 8, kFloor = 3;

// To the nearest whole number, to even between two: for less than 2^51, in two additions, which unlike a call of rint
// the compiler makes into vectors.
double nearest(double value) {
    constexpr double kShift = 0x1.8p52;
    return (value + kShift) - kShift;
}

// The same for a trace or the past of a use, which are far below 64, on the grid of 2^-16.
float on_grid(float value) {
    constexpr float kShift = 0x1.8p23f, kScale = 1 / kGrid;
    return ((value * kScale + kShift) - kShift) / kScale;
}

template <typename Body>
void for_each_bit(uint64_t bits, const Body& body) {
    for (; bits; bits &= bits - 1) body(std::countr_zero(bits));
}

// Exact: its callers' numbers are multiples of the grid.
double dot(const double* a, const double* b, int64_t count) {
    double sums[8] = {};
    int64_t at = 0;
    for (; at + 8 <= count; at += 8)
        for (int k = 0; k < 8; ++k) sums[k] += a[at + k] * b[at + k];
    for (; at < count; ++at) sums[0] += a[at] * b[at];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

const float LearnedMixture::kAbsent = std::numeric_limits<float>::infinity();

LearnedMixture::LearnedMixture(const MixtureArrays& arrays, const MixtureConstants& constants)
    : arrays(arrays),
      constants_(constants),
      full_(arrays.batch),
      filled_(arrays.layers),
      least_(arrays.layers, kUnknown),
      sources_(arrays.layers * arrays.batch),
      own_(arrays.layers * arrays.batch) {}

void LearnedMixture::begin_pass(double discount, int64_t full) {
    full_ = full;
    previous_.clear();
    for (int64_t i = 0; i < arrays.layers; ++i) {
        const double here = arrays.delay[i] * discount;
        for (int64_t f = 0; f < kFeatures; ++f)
            arrays.ranking[i * kFeatures + f] = static_cast<float>(arrays.weights[i * kFeatures + f] * here);
        arrays.floor[i] = static_cast<float>(here * constants_.least_share);
    }
    if (std::all_of(filled_.begin(), filled_.end(), [&](int64_t tokens) { return tokens == full_; }))
        for (int64_t i = 0; i < arrays.layers; ++i) learn(i);
}

void LearnedMixture::account(int64_t i, const std::vector<int64_t>& experts) {
    const int64_t width = arrays.width;
    if (filled_[i] == full_) learn(i);
    const int64_t at = filled_[i]++, own = static_cast<int64_t>(experts.size());
    std::vector<int64_t>& sources = sources_[i * arrays.batch + at];
    sources.assign(experts.begin(), experts.end());
    sources.insert(sources.end(), previous_.begin(), previous_.end());
    own_[i * arrays.batch + at] = own;

    const double kept = arrays.total[i] * constants_.slow, total = kept + 1;
    arrays.total[i] = total;
    arrays.keep[kSlow] = static_cast<float>(kept / total);
    arrays.gain[kSlow] = static_cast<float>(1 / total);
    float* const block = arrays.batches + i * (arrays.batch + 1) * kFeatures * width;
    const float* const old = block + (at ? at - 1 : arrays.batch) * kFeatures * width;
    float* const features = block + at * kFeatures * width;
    for (int64_t f = 0; f < kOwn; ++f) {
        for (int64_t e = 0; e < width; ++e) features[f * width + e] = old[f * width + e] * arrays.keep[f];
        for (const int64_t e : experts) features[f * width + e] += arrays.gain[f];
    }
    const float recent = arrays.keep[kOwnRecent];
    for (int64_t e = 0; e < width; ++e)
        features[kOwnRecent * width + e] = old[kOwnRecent * width + e] * recent + old[kOwn * width + e];
    const float older = arrays.keep[kAge];
    for (int64_t e = 0; e < width; ++e) features[kAge * width + e] = old[kAge * width + e] * older;
    for (const int64_t e : experts) features[kAge * width + e] = 1;

    const int64_t count = static_cast<int64_t>(sources.size());
    const auto affinity = [&](int64_t row, int64_t begin, int64_t end) {
        float* const out = features + row * width;
        std::fill_n(out, width, 0.0f);
        const float mean = static_cast<float>(1.0 / static_cast<double>(std::max<int64_t>(end - begin, 1)));
        double sum = 0;
        for (int64_t k = begin; k < end; ++k) {
            const float trust = arrays.trust[i * 2 * width + sources[k]] * mean;
            sum += trust;
            const float* const follows = arrays.follows + (i * 2 * width + sources[k]) * width;
            for (int64_t e = 0; e < width; ++e) out[e] += follows[e] * trust;
        }
        const float doubt = begin == end ? 1.0f : static_cast<float>(constants_.doubt * sum);
        for (int64_t e = 0; e < width; ++e) out[e] += features[kSlow * width + e] * doubt;
    };
    affinity(kOwn, 0, own);
    affinity(kBefore, own, count);
    previous_.assign(experts.begin(), experts.end());
    for (int64_t& expert : previous_) expert += width;
    value(i, features);
}

void LearnedMixture::value(int64_t i, const float* features) {
    const int64_t width = arrays.width;
    const float* const ranking = arrays.ranking + i * kFeatures;
    float* const values = arrays.values + i * width;
    for (int64_t e = 0; e < width; ++e) values[e] = features[e] * ranking[0];
    for (int64_t f = 1; f < kFeatures; ++f)
        for (int64_t e = 0; e < width; ++e) values[e] += features[f * width + e] * ranking[f];
    const float* const absence = arrays.absence + i * width;
    float* const candidates = arrays.candidates + i * width;
    const float* const frequency = features + kFloor * width;
    for (int64_t e = 0; e < width; ++e) {
        const float least = frequency[e] * arrays.floor[i];
        values[e] = values[e] < least ? least : values[e];
        candidates[e] = values[e] + absence[e];
    }
    changed(i);
}

void LearnedMixture::learn(int64_t i) {
    const int64_t count = filled_[i], width = arrays.width;
    if (!count) return;
    filled_[i] = 0;
    learn_fit(i, count);
    learn_affinities(i, count);
    float* const block = arrays.batches + i * (arrays.batch + 1) * kFeatures * width;
    const float* const last = block + (count - 1) * kFeatures * width;
    float* const start = block + arrays.batch * kFeatures * width;
    for (int64_t at = 0; at < kFeatures * width; ++at)
        start[at] = std::fabs(last[at]) < constants_.nothing ? 0.0f : last[at];
}

void LearnedMixture::learn_fit(int64_t i, int64_t count) {
    const int64_t width = arrays.width, sampled = arrays.sampled;
    const double forget = arrays.forget[count];
    // [token, sampled]: discounted uses after each token; then [sampled]: seen from before the batch.
    later_uses_.assign((count + 1) * sampled, 0);
    double* const from_before = later_uses_.data() + count * sampled;
    for (int64_t t = 0; t < count; ++t) {
        const std::vector<int64_t>& sources = sources_[i * arrays.batch + t];
        for (int64_t k = 0; k < own_[i * arrays.batch + t]; ++k) {
            if (sources[k] % arrays.step) continue;
            const int64_t c = sources[k] / arrays.step;
            for (int64_t s = 0; s < t; ++s) later_uses_[s * sampled + c] += arrays.powers[t - s - 1];
            from_before[c] += arrays.powers[t];
        }
    }
    // Of one token after the other, so that the rows stay in the processor's nearest cache.
    std::array<double, kFeatures * kFeatures> both{};
    std::array<double, kFeatures> gain{};
    double* const traces = arrays.feature_trace + i * kFeatures * sampled;
    for (int64_t f = 0; f < kFeatures; ++f) gain[f] = dot(traces + f * sampled, from_before, sampled);
    rows_.resize(kFeatures * sampled);
    sums_.assign(kFeatures * sampled, 0);
    for (int64_t t = 0; t < count; ++t) {
        const float* const features = arrays.batches + (i * (arrays.batch + 1) + t) * kFeatures * width;
        const double fading = arrays.powers[count - 1 - t];
        for (int64_t f = 0; f < kFeatures; ++f) {
            double* const row = rows_.data() + f * sampled;
            double* const sum = sums_.data() + f * sampled;
            if (arrays.step == 1)
                for (int64_t c = 0; c < sampled; ++c) row[c] = nearest(features[f * width + c] * (1 / kGrid));
            else
                for (int64_t c = 0; c < sampled; ++c) row[c] = nearest(features[f * width + c * arrays.step] * (1 / kGrid));
            for (int64_t c = 0; c < sampled; ++c) sum[c] += fading * row[c];
            gain[f] += dot(row, later_uses_.data() + t * sampled, sampled);
            for (int64_t g = 0; g <= f; ++g) both[f * kFeatures + g] += dot(row, rows_.data() + g * sampled, sampled);
        }
    }
    double* const gram = arrays.gram + i * kFeatures * kFeatures;
    double* const moment = arrays.moment + i * kFeatures;
    for (int64_t f = 0; f < kFeatures; ++f) {
        for (int64_t g = 0; g <= f; ++g)
            gram[f * kFeatures + g] = gram[g * kFeatures + f] = gram[f * kFeatures + g] * forget + both[f * kFeatures + g] * (kGrid * kGrid);
        moment[f] = moment[f] * forget + gain[f] * (kGrid * constants_.horizon_share);
    }
    const double last = arrays.powers[count];
    for (int64_t c = 0; c < kFeatures * sampled; ++c) traces[c] = nearest(traces[c] * last + sums_[c]);
}

void LearnedMixture::learn_affinities(int64_t i, int64_t count) {
    const int64_t width = arrays.width;
    float* const traces = arrays.source_trace + i * 2 * width;
    float* const seen = arrays.seen + i * 2 * width;
    float* const trust = arrays.trust + i * 2 * width;
    // By source, the tokens that had it: a bit each. An expert of the layer itself is a source wherever it is used.
    source_tokens_.assign(2 * width, 0);
    for (int64_t t = 0; t < count; ++t)
        for (const int64_t source : sources_[i * arrays.batch + t]) source_tokens_[source] |= uint64_t{1} << t;
    near_.clear();
    used_.clear();
    for (int64_t source = 0; source < 2 * width; ++source) {
        if (source_tokens_[source] || traces[source] > constants_.faded) near_.push_back(source);
        if (source_tokens_[source] && source < width) used_.push_back(source);
    }
    // As many sources at once as a cache line holds. [token, source]: the past of each use; [used, source]: their sums.
    past_.resize(count * kBlock);
    added_.resize(used_.size() * kBlock);
    for (size_t begin = 0; begin < near_.size(); begin += kBlock) {
        const int64_t* const sources = near_.data() + begin;
        const auto here = static_cast<int64_t>(std::min<size_t>(kBlock, near_.size() - begin));
        float before[kBlock] = {};
        for (int64_t b = 0; b < here; ++b) before[b] = traces[sources[b]];
        for (int64_t t = 0; t < count; ++t)
            for (int64_t b = 0; b < kBlock; ++b) past_[t * kBlock + b] = on_grid(arrays.powers[t] * before[b]);
        for (int64_t b = 0; b < here; ++b)
            for_each_bit(source_tokens_[sources[b]], [&](int64_t s) {
                for (int64_t t = s + 1; t < count; ++t) past_[t * kBlock + b] += arrays.powers[t - s - 1];
            });
        for (size_t k = 0; k < used_.size(); ++k) {
            float sums[kBlock] = {};
            for_each_bit(source_tokens_[used_[k]], [&](int64_t t) {
                for (int64_t b = 0; b < kBlock; ++b) sums[b] += past_[t * kBlock + b];
            });
            std::copy_n(sums, kBlock, added_.data() + k * kBlock);
        }
        for (int64_t b = 0; b < here; ++b) {
            float* const follows = arrays.follows + (i * 2 * width + sources[b]) * width;
            for (size_t k = 0; k < used_.size(); ++k) follows[used_[k]] += added_[k * kBlock + b];
        }
    }
    const float last = arrays.powers[count], open = static_cast<float>(constants_.horizon_share);
    for (int64_t source = 0; source < 2 * width; ++source) {
        float fresh = 0;
        for_each_bit(source_tokens_[source], [&](int64_t s) { fresh += arrays.powers[count - 1 - s]; });
        traces[source] = on_grid(traces[source] * last + fresh);
        seen[source] += static_cast<float>(std::popcount(source_tokens_[source]));
        trust[source] = open / seen[source];
    }
}

void LearnedMixture::insert(int64_t i, int64_t expert) {
    const int64_t at = i * arrays.width + expert;
    arrays.absence[at] = 0;
    exchange(at, arrays.values[at]);
}

void LearnedMixture::remove(int64_t i, int64_t expert) {
    const int64_t at = i * arrays.width + expert;
    arrays.absence[at] = kAbsent;
    exchange(at, kAbsent);
}

float LearnedMixture::exchange(int64_t at, float value) {
    changed(at / arrays.width);
    return std::exchange(arrays.candidates[at], value);
}

int64_t LearnedMixture::least() {
    int64_t found = -1;
    float best = kAbsent;
    for (int64_t i = 0; i < arrays.layers; ++i) {
        if (least_[i] == kUnknown) {
            const float* const row = arrays.candidates + i * arrays.width;
            const float* const first = std::min_element(row, row + arrays.width);
            least_[i] = *first == kAbsent ? -1 : first - arrays.candidates;
        }
        if (least_[i] >= 0 && arrays.candidates[least_[i]] < best) {
            found = least_[i];
            best = arrays.candidates[found];
        }
    }
    return found;
}

}  // namespace moei
