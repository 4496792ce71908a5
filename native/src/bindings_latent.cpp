// Attention over latents, as Python sees it.
#include "bindings.h"

namespace moei {
namespace {

// q_a: null where q reads the hidden state; q_norm is then empty.
void make(LatentAttention* self, const Weights* q_a, const Weights& q, const Weights& kv_a, const Weights& kv_b, const Weights& o,
          int64_t heads, int64_t nope, int64_t rotary, int64_t value, double scale, std::string_view turn,
          const std::vector<float>& q_norm, double q_eps, const std::vector<float>& kv_norm, double kv_eps) {
    const Weights& first = q_a ? *q_a : q;
    const int64_t hidden = kv_a.matrix.cols, rank = kv_a.matrix.rows - rotary;
    require(heads > 0 && nope > 0 && value > 0 && rank > 0 && rotary > 0 && rotary % 2 == 0, "the heads do not fit together");
    require(first.matrix.cols == hidden && q.matrix.rows == heads * (nope + rotary) && kv_b.matrix.cols == rank &&
                kv_b.matrix.rows == heads * (nope + value) && o.matrix.rows == hidden && o.matrix.cols == heads * value &&
                (!q_a || q.matrix.cols == q_a->matrix.rows),
            "the projections do not fit together");
    require(first.matrix.format == kv_a.matrix.format, "the two that read the hidden state must be of one format");
    const Matrix& both = kv_b.matrix;
    require(!kv_b.bias && ((is_float(both.format) && both.order == Order::Plain) ||
                           (both.format == Format::Q8_0 && both.order == Order::Rows16 && nope % kTileRows == 0 && value % kTileRows == 0)),
            "the matrix that expands latents is stored otherwise than the kernel wants it");
    require(static_cast<int64_t>(kv_norm.size()) == rank && static_cast<int64_t>(q_norm.size()) == (q_a ? q_a->matrix.rows : 0),
            "a norm must have a weight for each value");
    new (self) LatentAttention{{hidden, heads, nope, rotary, value, rank, static_cast<float>(scale), turn_from_name(turn),
                                q_a ? *q_a : Weights{}, q, kv_a, kv_b, o, {}, {}},
                               q_norm, kv_norm};
    self->layout.q_norm = {self->q_norm.data(), static_cast<float>(q_eps)};
    self->layout.kv_norm = {self->kv_norm.data(), static_cast<float>(kv_eps)};
}

void call(const LatentAttention& attention, std::string_view type, int64_t x, int64_t cosine, int64_t sine, int64_t latents,
          int64_t turned, int64_t capacity, int64_t position, int64_t mask, int64_t out) {
    const AttentionCall made = attention_call(type, x, cosine, sine, latents, turned, capacity, position, mask, out);
    exclusively([&](ThreadPool& pool, Workspace& workspace) { attend(attention.layout, made, pool, workspace); });
}

}  // namespace

void bind_latent_attention(nb::module_& m) {
    nb::class_<LatentAttention>(m, "LatentAttention")
        .def("__init__", &make, nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg())
        .def("__call__", &call);
}

}  // namespace moei
