// The Python module moei_core.quant._native. Shapes are checked by moei_core/quant/native.py when a layout is made;
// here is what can differ from call to call.
#include <nanobind/ndarray.h>

#include <chrono>
#include <string>

#include "bindings.h"

namespace moei {
namespace {

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const uint8_t, 1>;
using MutableBytes = Array<uint8_t, 1>;

constexpr int kMostThreads = 1024;

void set_num_threads(int threads) {
    require(threads >= 1 && threads <= kMostThreads, "threads must lie between 1 and 1024");
    const nb::gil_scoped_release release;
    Runtime& shared = runtime();
    const std::lock_guard lock(shared.mutex);
    shared.ready();
    if (shared.threads == threads) return;
    shared.pool.reset();
    shared.threads = threads;
}

int num_threads() {
    return exclusively([](ThreadPool& pool, Workspace&) { return pool.threads(); });
}

FfnLayout make_layout(int64_t hidden, int64_t intermediate, std::string_view gate_up_format, std::string_view gate_up_order,
                      std::string_view gating, std::string_view down_format, std::string_view down_order,
                      std::string_view activation, double alpha, double limit, std::string_view bias_format) {
    FfnLayout layout{};
    layout.hidden = hidden;
    layout.intermediate = intermediate;
    layout.gate_up_format = format_from_name(gate_up_format);
    layout.gate_up_order = order_from_name(gate_up_order);
    layout.gating = gating_from_name(gating);
    layout.down_format = format_from_name(down_format);
    layout.down_order = order_from_name(down_order);
    layout.bias_format = format_from_name(bias_format);
    layout.activation = {activation_from_name(activation), static_cast<float>(alpha), static_cast<float>(limit)};
    return layout;
}

void call_ffn(const FfnLayout& layout, Array<const int64_t, 2> parts, Array<const int64_t, 1> offsets,
              Array<const int64_t, 1> rows, Array<const float, 2> x, Array<float, 2> out,
              std::optional<Array<const int64_t, 1>> places, std::optional<Array<const float, 1>> weights) {
    static_assert(sizeof(ExpertParts) == 6 * sizeof(int64_t));
    const auto experts = static_cast<int64_t>(parts.shape(0)), pairs = static_cast<int64_t>(rows.shape(0));
    const auto tokens = static_cast<int64_t>(x.shape(0)), hidden = static_cast<int64_t>(x.shape(1));
    require(parts.shape(1) == 6, "parts must be [experts, 6]");
    require(hidden == layout.hidden, "x must be [tokens, hidden]");
    const auto placed = static_cast<int64_t>(out.shape(0));
    require(static_cast<int64_t>(out.shape(1)) == hidden && (places || placed == pairs), "out must be [pairs, hidden]");
    const auto each = [&](const auto& array) { return static_cast<int64_t>(array->shape(0)) == pairs; };
    require(places.has_value() == weights.has_value() && (!places || (each(places) && each(weights))),
            "there must be a place and a weight for each pair");
    require(static_cast<int64_t>(offsets.shape(0)) == experts + 1 && offsets.data()[0] == 0 && offsets.data()[experts] == pairs,
            "offsets must be [experts + 1], from 0 to the number of pairs");
    for (int64_t e = 0; e < experts; ++e) {
        require(offsets.data()[e] <= offsets.data()[e + 1], "offsets must not decrease");
        const ExpertParts& part = reinterpret_cast<const ExpertParts*>(parts.data())[e];
        require(part.gate && part.down && (layout.gating != Gating::Separate || part.up), "an expert's address is missing");
    }
    for (int64_t p = 0; p < pairs; ++p) {
        require(rows.data()[p] >= 0 && rows.data()[p] < tokens, "rows must be rows of x");
        require(!places || (places->data()[p] >= 0 && places->data()[p] < placed), "places must be rows of out");
    }
    const FfnCall call{experts, tokens, reinterpret_cast<const ExpertParts*>(parts.data()), offsets.data(), rows.data(), x.data(), out.data(),
                       places ? places->data() : nullptr, weights ? weights->data() : nullptr};
    exclusively([&](ThreadPool& pool, Workspace& workspace) { moe_ffn(layout, call, pool, workspace); });
}

Matrix make_matrix(std::string_view format, std::string_view order, int64_t address, int64_t rows, int64_t cols) {
    const Order stored = order_from_name(order);
    return {reinterpret_cast<const uint8_t*>(address), format_from_name(format), stored, rows, cols,
            stored == Order::Transposed ? rows : cols};
}

Weights make_weights(std::string_view format, std::string_view order, int64_t address, int64_t rows, int64_t cols,
                     std::string_view bias_format, int64_t bias) {
    require(address != 0, "the weight's address is missing");
    return {make_matrix(format, order, address, rows, cols), reinterpret_cast<const uint8_t*>(bias), format_from_name(bias_format)};
}

void call_linear(const Weights& weights, std::string_view type, int64_t x, int64_t tokens, int64_t out) {
    require(x != 0 && out != 0 && tokens >= 0, "an address is missing");
    const Format stored = float_type(type);
    exclusively([&](ThreadPool& pool, Workspace& workspace) {
        linear(weights, stored, reinterpret_cast<const uint8_t*>(x), tokens, reinterpret_cast<uint8_t*>(out), pool, workspace);
    });
}

// A norm's weights are copied, so that Python need not keep float32 ones alive.
struct Attention {
    AttentionLayout layout;
    std::vector<float> q_norm, k_norm, sinks;
};

void make_attention(Attention* self, const Weights& q, const Weights& k, const Weights& v, const Weights& o, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t rotary, double scale, double eps,
                    const std::vector<float>& q_norm, const std::vector<float>& k_norm, const std::vector<float>& sinks,
                    double clip, std::string_view rotation, std::string_view turn_type) {
    const int64_t hidden = q.matrix.cols, width = heads * head_dim, kv_width = kv_heads * head_dim;
    require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && rotary % 2 == 0 && rotary <= head_dim, "the heads do not fit together");
    require(q.matrix.rows == width && k.matrix.rows == kv_width && v.matrix.rows == kv_width && k.matrix.cols == hidden &&
                v.matrix.cols == hidden && o.matrix.rows == hidden && o.matrix.cols == width,
            "the projections do not fit together");
    require(q.matrix.format == k.matrix.format && q.matrix.format == v.matrix.format, "q, k and v must be of one format");
    const auto q_size = static_cast<int64_t>(q_norm.size()), k_size = static_cast<int64_t>(k_norm.size());
    const bool each = q_size == head_dim && k_size == head_dim, wide = q_size == width && k_size == kv_width;
    require((q_norm.empty() && k_norm.empty()) || each || wide, "the norms must have a weight for each value of a head, or of all heads");
    require(sinks.empty() || static_cast<int64_t>(sinks.size()) == heads, "there must be a sink for each head");
    require(clip > 0, "a limit must be positive");
    new (self) Attention{{hidden, heads, kv_heads, head_dim, rotary, static_cast<float>(scale), static_cast<float>(eps), q, k, v, o, nullptr, nullptr,
                          wide && !each, rotation_from_name(rotation), float_type(turn_type), static_cast<float>(clip), nullptr},
                         q_norm, k_norm, sinks};
    self->layout.q_norm = self->q_norm.empty() ? nullptr : self->q_norm.data();
    self->layout.k_norm = self->k_norm.empty() ? nullptr : self->k_norm.data();
    self->layout.sinks = self->sinks.empty() ? nullptr : self->sinks.data();
}

void call_attention(const Attention& attention, std::string_view type, int64_t x, int64_t cosine, int64_t sine, int64_t keys,
                    int64_t values, int64_t capacity, int64_t position, int64_t mask, int64_t out) {
    const AttentionCall call = attention_call(type, x, cosine, sine, keys, values, capacity, position, mask, out);
    exclusively([&](ThreadPool& pool, Workspace& workspace) { attend(attention.layout, call, pool, workspace); });
}

void call_rms_norm(const RmsNorm& norm, std::string_view type, int64_t x, int64_t rows, int64_t out) {
    require(x != 0 && out != 0 && rows >= 0, "an address is missing");
    const Format stored = float_type(type);
    const auto count = static_cast<int64_t>(norm.weight.size()), nbytes = row_nbytes(stored, count);
    std::vector<float> row(norm.weight.size());
    for (int64_t i = 0; i < rows; ++i) {
        widen(stored, reinterpret_cast<const uint8_t*>(x) + i * nbytes, count, row.data());
        rms_norm(row.data(), norm.weight.data(), count, static_cast<float>(norm.eps), row.data());
        narrow(stored, row.data(), count, reinterpret_cast<uint8_t*>(out) + i * nbytes);
    }
}

// One token through its experts: out = the outputs times their weights, summed in the order given.
void call_moe_token(const FfnLayout& layout, const nb::list& experts, const std::vector<float>& weights, std::string_view type,
                    int64_t x, int64_t out) {
    const auto count = static_cast<int64_t>(experts.size());
    require(count > 0 && weights.size() == experts.size() && x != 0 && out != 0, "an expert's weight or an address is missing");
    const Format stored = float_type(type);
    std::vector<ExpertParts> parts;
    for (const nb::handle expert : experts) parts.push_back(nb::cast<const ExpertParts&>(expert));
    const auto bytes = [](int64_t address) { return reinterpret_cast<uint8_t*>(address); };
    exclusively([&](ThreadPool& pool, Workspace& workspace) {
        moe_token(layout, count, parts.data(), weights.data(), stored, bytes(x), bytes(out), runtime().scratch, pool, workspace);
    });
}

// The outputs of some of one token's experts, each in its row.
void call_expert_rows(const FfnLayout& layout, const nb::list& experts, const std::vector<int64_t>& rows, std::string_view type,
                      int64_t x, int64_t outputs) {
    const auto count = static_cast<int64_t>(experts.size());
    require(count > 0 && rows.size() == experts.size() && x != 0 && outputs != 0, "an expert's row or an address is missing");
    for (const int64_t row : rows) require(row >= 0, "a row is negative");
    const Format stored = float_type(type);
    std::vector<ExpertParts> parts;
    for (const nb::handle expert : experts) parts.push_back(nb::cast<const ExpertParts&>(expert));
    exclusively([&](ThreadPool& pool, Workspace& workspace) {
        expert_rows(layout, count, parts.data(), rows.data(), stored, reinterpret_cast<const uint8_t*>(x),
                    reinterpret_cast<float*>(outputs), runtime().scratch, pool, workspace);
    });
}

void call_weigh_rows(int64_t hidden, const std::vector<float>& weights, std::string_view type, int64_t outputs, int64_t out) {
    require(hidden > 0 && !weights.empty() && outputs != 0 && out != 0, "a weight or an address is missing");
    const Format stored = float_type(type);
    exclusively([&](ThreadPool&, Workspace&) {
        weigh_rows(static_cast<int64_t>(weights.size()), hidden, reinterpret_cast<const float*>(outputs), weights.data(), stored,
                   reinterpret_cast<uint8_t*>(out), runtime().scratch);
    });
}

void make_router(RouterLayout* self, const Weights& weights, int64_t top_k, double scale, bool normed, bool rounded, bool wide, bool sorted,
                 bool late) {
    require(top_k > 0 && top_k <= weights.matrix.rows, "a router must choose some of its experts");
    new (self) RouterLayout{weights, top_k, static_cast<float>(scale), normed, rounded, wide, sorted, late};
}

void call_router(const RouterLayout& router, std::string_view type, int64_t x, int64_t rows, int64_t logits, int64_t experts,
                 int64_t weights) {
    require(x && logits && experts && weights && rows >= 0, "an address is missing");
    const Format stored = float_type(type);
    const int64_t in = row_nbytes(stored, router.weights.matrix.cols), out = row_nbytes(router.wide ? Format::F32 : stored, router.weights.matrix.rows);
    exclusively([&](ThreadPool& pool, Workspace& workspace) {
        for (int64_t i = 0; i < rows; ++i)
            route(router, stored, reinterpret_cast<const uint8_t*>(x) + i * in, reinterpret_cast<uint8_t*>(logits) + i * out,
                  reinterpret_cast<int64_t*>(experts) + i * router.top_k, reinterpret_cast<float*>(weights) + i * router.top_k,
                  runtime().scratch, pool, workspace);
    });
}

std::vector<int64_t> call_early(const RouterLayout& router, const RmsNorm* norm, std::string_view type, int64_t x) {
    require(x != 0, "an address is missing");
    require(!norm || static_cast<int64_t>(norm->weight.size()) == router.weights.matrix.cols, "the norm does not fit the router");
    const Format stored = float_type(type);
    std::vector<int64_t> experts(static_cast<size_t>(router.top_k));
    const Norm through{norm ? norm->weight.data() : nullptr, norm ? static_cast<float>(norm->eps) : 0.0f};
    exclusively([&](ThreadPool& pool, Workspace& workspace) {
        route_early(norm ? &through : nullptr, router, stored, reinterpret_cast<const uint8_t*>(x), experts.data(), runtime().scratch,
                    pool, workspace);
    });
    return experts;
}

// The norms' weights are copied; those of the attention's heads stay where they are: the binding keeps `attention`.
struct Layer {
    std::vector<float> input_norm, behind_norm;
    LayerLayout layout;
    std::vector<uint8_t> normed;
};

template <typename Attending>
void make_layer(Layer* self, const Attending& attention, const RmsNorm& input, const RmsNorm& behind, const RouterLayout& router,
                const FfnLayout* shared, const ExpertParts* parts) {
    const auto hidden = static_cast<size_t>(attention.layout.hidden);
    require(input.weight.size() == hidden && behind.weight.size() == hidden &&
                router.weights.matrix.cols == attention.layout.hidden && attention.layout.o.matrix.rows == attention.layout.hidden,
            "the parts of the layer do not fit together");
    new (self) Layer{input.weight, behind.weight, {}, std::vector<uint8_t>(4 * hidden)};
    self->layout = {{self->input_norm.data(), static_cast<float>(input.eps)}, {self->behind_norm.data(), static_cast<float>(behind.eps)},
                    attention.layout, router, {}};
    if (!shared) return;
    require(shared->hidden == attention.layout.hidden && parts, "the shared expert does not fit the layer");
    self->layout.shared = SharedExpert{*shared, *parts};
}

// Without a table: up to the router, and what the experts are given goes to `normed`. With one, the whole layer: returns
// the nanoseconds that the experts took.
int64_t call_layer(Layer& layer, std::string_view type, int64_t x, int64_t cosine, int64_t sine, int64_t keys, int64_t values,
                   int64_t capacity, int64_t position, int64_t mask, int64_t out, int64_t experts, int64_t weights,
                   int64_t normed, const ExpertTable* table) {
    require(experts && weights && (normed || table), "an address is missing");
    const AttentionCall call = attention_call(type, x, cosine, sine, keys, values, capacity, position, mask, out);
    const auto& router = layer.layout.router;
    if (table) {
        require(static_cast<int64_t>(table->parts.size()) == router.weights.matrix.rows && table->layout.hidden == router.weights.matrix.cols,
                "the experts do not fit the layer");
    }
    auto* const chosen = reinterpret_cast<int64_t*>(experts);
    auto* const scale = reinterpret_cast<float*>(weights);
    return exclusively([&](ThreadPool& pool, Workspace& workspace) -> int64_t {
        LayerScratch& scratch = runtime().scratch;
        auto* const given = normed ? reinterpret_cast<uint8_t*>(normed) : layer.normed.data();
        route_token(layer.layout, call, given, chosen, scale, scratch, pool, workspace);
        if (!table) return 0;
        if (layer.layout.shared) share_token(*layer.layout.shared, call.type, given, scratch, pool, workspace);
        const auto started = std::chrono::steady_clock::now();
        add_experts(*table, router.top_k, chosen, scale, call.type, given, layer.layout.shared.has_value(), call.out, scratch, pool, workspace);
        return std::chrono::nanoseconds(std::chrono::steady_clock::now() - started).count();
    });
}

using Convert = void (*)(Format, int64_t, int64_t, const uint8_t*, uint8_t*);

template <Convert convert>
void call_convert(std::string_view format, int64_t rows, int64_t cols, Bytes source, MutableBytes destination) {
    const Format stored = format_from_name(format);
    const bool packing = convert == to_rows16;
    const auto row_order = static_cast<size_t>(matrix_nbytes(stored, Order::Plain, rows, cols));
    const auto interleaved = static_cast<size_t>(matrix_nbytes(stored, Order::Rows16, rows, cols));
    require(source.size() == (packing ? row_order : interleaved) && destination.size() == (packing ? interleaved : row_order),
            "source or destination has the wrong number of bytes");
    const nb::gil_scoped_release release;
    convert(stored, rows, cols, source.data(), destination.data());
}

void call_join_mxfp4(std::string_view order, int64_t rows, int64_t cols, MutableBytes memory, int64_t scales_at, int64_t blocks_at, int64_t destination) {
    const Order wanted = order_from_name(order);
    const int64_t count = rows * (cols / kBlock), total = matrix_nbytes(Format::MXFP4, wanted, rows, cols), end = static_cast<int64_t>(memory.size());
    require(rows > 0 && cols > 0 && cols % kBlock == 0 && (wanted == Order::Plain || (wanted == Order::Rows16 && rows % kTileRows == 0)), "no such matrix");
    require(scales_at >= 0 && scales_at + count <= end && destination >= 0 && destination + total <= end && blocks_at + 16 * count <= end, "a part is outside of the memory");
    require(blocks_at - destination >= count, "the blocks would be overwritten before they are read");
    const nb::gil_scoped_release release;
    // What is made may overwrite the scales too.
    const std::vector<uint8_t> scales(memory.data() + scales_at, memory.data() + scales_at + count);
    join_mxfp4(wanted, rows, cols, scales.data(), memory.data() + blocks_at, memory.data() + destination);
}

void call_decode(std::string_view format, Bytes source, Array<float, 1> out) {
    const Format stored = format_from_name(format);
    const auto count = static_cast<int64_t>(out.size());
    require(count % format_info(stored).block_weights == 0 && static_cast<int64_t>(source.size()) == row_nbytes(stored, count),
            "source has the wrong number of bytes");
    const nb::gil_scoped_release release;
    decode(stored, source.data(), count, out.data());
}

bool call_all_finite(std::string_view format, std::string_view order, int64_t rows, int64_t cols, Bytes source) {
    const Format stored = format_from_name(format);
    require(static_cast<int64_t>(source.size()) == matrix_nbytes(stored, order_from_name(order), rows, cols), "source has the wrong number of bytes");
    const nb::gil_scoped_release release;
    return all_finite(stored, order_from_name(order), rows, cols, source.data());
}

}  // namespace
}  // namespace moei

NB_MODULE(_native, m) {
    using namespace moei;
    using namespace nb::literals;
    // Whoever ends with an error still holds the model by its traceback: that is no leak, and a page of names no help.
    nb::set_leak_warnings(false);
    nb::class_<FfnLayout>(m, "FfnLayout").def("__init__", [](FfnLayout* self, int64_t hidden, int64_t intermediate, std::string_view gate_up_format, std::string_view gate_up_order, std::string_view gating, std::string_view down_format, std::string_view down_order, std::string_view activation, double alpha, double limit, std::string_view bias_format) {
        new (self) FfnLayout(make_layout(hidden, intermediate, gate_up_format, gate_up_order, gating, down_format, down_order, activation, alpha, limit, bias_format));
    });
    nb::dict formats;
    for (int i = 0; i <= static_cast<int>(Format::MXFP4); ++i) {
        const FormatInfo& info = format_info(static_cast<Format>(i));
        formats[info.name] = nb::make_tuple(info.block_weights, info.block_nbytes);
    }
    m.attr("FORMATS") = formats;
    m.def("isa", [] { return kernels().isa; });
    m.def("set_num_threads", &set_num_threads);
    m.def("num_threads", &num_threads);
    // An array of another type or order must be refused: a converted copy of `out` would swallow the result.
    const auto exact = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("moe_ffn", &call_ffn, "layout"_a, exact("parts"), exact("offsets"), exact("rows"), exact("x"), exact("out"),
          exact("places").none(), exact("weights").none());
    nb::class_<ExpertParts>(m, "ExpertParts").def("__init__", [](ExpertParts* self, int64_t gate, int64_t up, int64_t down, int64_t gate_bias, int64_t up_bias, int64_t down_bias) {
        require(gate && down, "an expert's address is missing");
        new (self) ExpertParts{gate, up, down, gate_bias, up_bias, down_bias};
    });
    m.def("moe_token", &call_moe_token, "layout"_a, "experts"_a, "weights"_a, "type"_a, "x"_a, "out"_a);
    m.def("expert_rows", &call_expert_rows, "layout"_a, "experts"_a, "rows"_a, "type"_a, "x"_a, "outputs"_a);
    m.def("weigh_rows", &call_weigh_rows, "hidden"_a, "weights"_a, "type"_a, "outputs"_a, "out"_a);
    nb::class_<Weights>(m, "Weights").def("__init__", [](Weights* self, std::string_view format, std::string_view order, int64_t address, int64_t rows, int64_t cols, std::string_view bias_format, int64_t bias) {
        new (self) Weights(make_weights(format, order, address, rows, cols, bias_format, bias));
    });
    m.def("linear", &call_linear, "weights"_a, "type"_a, "x"_a, "tokens"_a, "out"_a);
    nb::class_<Attention>(m, "Attention").def("__init__", &make_attention).def("__call__", &call_attention);
    bind_latent_attention(m);
    bind_learned(m);
    nb::class_<RmsNorm>(m, "RmsNorm")
        .def("__init__", [](RmsNorm* self, const std::vector<float>& weight, double eps) { new (self) RmsNorm{weight, eps}; })
        .def("__call__", &call_rms_norm);
    nb::class_<RouterLayout>(m, "Router").def("__init__", &make_router).def("__call__", &call_router).def("early", &call_early, nb::arg().none(), nb::arg(), nb::arg());
    nb::class_<ExpertTable>(m, "ExpertTable").def("__init__", [](ExpertTable* self, const FfnLayout& layout, const nb::list& experts) {
        new (self) ExpertTable{layout, {}};
        for (const nb::handle expert : experts) self->parts.push_back(nb::cast<const ExpertParts&>(expert));
    });
    nb::class_<Layer>(m, "Layer")
        .def("__init__", &make_layer<Attention>, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none())
        .def("__init__", &make_layer<LatentAttention>, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none())
        .def("__call__", &call_layer, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("to_rows16", &call_convert<to_rows16>, "format"_a, "rows"_a, "cols"_a, exact("source"), exact("destination"));
    m.def("from_rows16", &call_convert<from_rows16>, "format"_a, "rows"_a, "cols"_a, exact("source"), exact("destination"));
    m.def("join_mxfp4", &call_join_mxfp4, "order"_a, "rows"_a, "cols"_a, exact("memory"), "scales_at"_a, "blocks_at"_a, "destination"_a);
    m.def("decode", &call_decode, "format"_a, exact("source"), exact("out"));
    m.def("all_finite", &call_all_finite, "format"_a, "order"_a, "rows"_a, "cols"_a, exact("source"));
    m.def("workspace_nbytes", [](const FfnLayout& layout, int64_t tokens, int64_t pairs, int threads) {
        return ffn_workspace_nbytes(layout, tokens, pairs, threads);
    });
    m.def("release_workspace", [] {
        exclusively([](ThreadPool&, Workspace& workspace) { workspace.release(); });
    });
    m.def("read_bandwidth", [](Bytes buffer, int repeats) {
        require(buffer.size() >= 1 << 20, "the buffer must hold at least a mebibyte");
        return exclusively([&](ThreadPool& pool, Workspace&) {
            return read_bandwidth(buffer.data(), static_cast<int64_t>(buffer.size()), repeats, pool);
        });
    });
}
