// The default cache policy's arithmetic for Python.
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "bindings.h"
#include "learned.h"

namespace moei {

namespace {

// The arithmetic, and what keeps the arrays alive that it works on.
struct Mixture {
    LearnedMixture mixture;
    nb::dict arrays;
    nb::list keys;
};

template <typename T>
T* array(const nb::dict& arrays, const char* name, std::initializer_list<int64_t> shape) {
    using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
    Array found;
    require(arrays.contains(name) && nb::try_cast(arrays[name], found, false), (std::string(name) + " is missing or of another type").c_str());
    bool same = found.ndim() == shape.size();
    size_t at = 0;
    for (const int64_t length : shape) same = same && found.shape(at++) == static_cast<size_t>(length);
    require(same, (std::string(name) + " has another shape").c_str());
    return found.data();
}

void make(Mixture* self, const nb::dict& given, const nb::list& keys, int64_t width, int64_t batch, int64_t step, double slow,
          double horizon_share, double doubt, double least_share, double faded, double nothing) {
    const auto layers = static_cast<int64_t>(keys.size());
    require(layers > 0 && width > 0 && batch > 0 && batch <= 64 && step > 0, "a mixture needs layers, experts and a batch");
    const int64_t f = kFeatures, sampled = (width + step - 1) / step;
    const auto floats = [&](const char* name, std::initializer_list<int64_t> shape) { return array<float>(given, name, shape); };
    const auto doubles = [&](const char* name, std::initializer_list<int64_t> shape) { return array<double>(given, name, shape); };
    const MixtureArrays arrays{
        layers, width, batch, step, sampled,
        floats("values", {layers, width}), floats("absence", {layers, width}), floats("candidates", {layers, width}),
        floats("batches", {layers, batch + 1, f, width}), floats("follows", {layers, 2 * width, width}),
        floats("seen", {layers, 2 * width}), floats("trust", {layers, 2 * width}), floats("source_trace", {layers, 2 * width}),
        doubles("feature_trace", {layers, f, sampled}), doubles("gram", {layers, f, f}), doubles("moment", {layers, f}),
        floats("weights", {layers, f}), floats("ranking", {layers, f, 1}), floats("floor", {layers}),
        doubles("total", {layers}), doubles("delay", {layers}),
        floats("keep", {f, 1}), floats("gain", {5, 1}),
        floats("powers", {batch + 1}), doubles("forget", {batch + 1})};
    const MixtureConstants constants{slow, horizon_share, doubt, least_share, static_cast<float>(faded), static_cast<float>(nothing)};
    new (self) Mixture{LearnedMixture(arrays, constants), given, keys};
}

// The arithmetic, for layer number `i` and an expert of it.
LearnedMixture& checked(Mixture& self, int64_t i, int64_t expert = 0) {
    const MixtureArrays& arrays = self.mixture.arrays;
    require(i >= 0 && i < arrays.layers, "there is no such layer");
    require(expert >= 0 && expert < arrays.width, "there is no such expert");
    return self.mixture;
}

void account(Mixture& self, int64_t i, const std::vector<int64_t>& experts) {
    for (const int64_t expert : experts) checked(self, i, expert);
    checked(self, i).account(i, experts);
}

// The resident to give up for `expert` of layer `i`, none of `excluded`; None: keep them all. `expert` -1: whoever is least.
nb::object victim(Mixture& self, int64_t i, int64_t expert, const nb::object& excluded) {
    LearnedMixture& mixture = checked(self, i, std::max<int64_t>(expert, 0));
    const int64_t width = mixture.arrays.width;
    std::vector<std::pair<int64_t, float>> spared;
    nb::object found = nb::none();
    for (int64_t at; (at = mixture.least()) >= 0;) {
        nb::object key = self.keys[at / width][at % width];
        const int contained = PySequence_Contains(excluded.ptr(), key.ptr());
        if (contained < 0) break;
        if (!contained) {
            if (expert < 0 || mixture.arrays.candidates[at] < mixture.arrays.values[i * width + expert]) found = key;
            break;
        }
        spared.emplace_back(at, mixture.hide(at));
    }
    for (const auto& [at, value] : spared) mixture.exchange(at, value);
    if (PyErr_Occurred()) throw nb::python_error();
    return found;
}

}  // namespace

void bind_learned(nb::module_& m) {
    nb::class_<Mixture>(m, "LearnedMixture")
        .def("__init__", &make)
        .def("begin_pass", [](Mixture& self, double discount, int64_t full) {
            require(full > 0 && full <= self.mixture.arrays.batch, "a batch holds fewer tokens");
            self.mixture.begin_pass(discount, full);
        })
        .def("break_off", [](Mixture& self) { self.mixture.break_off(); })
        .def("account", &account)
        .def("learn", [](Mixture& self, int64_t i) { checked(self, i).learn(i); })
        .def("insert", [](Mixture& self, int64_t i, int64_t expert) { checked(self, i, expert).insert(i, expert); })
        .def("remove", [](Mixture& self, int64_t i, int64_t expert) { checked(self, i, expert).remove(i, expert); })
        .def("changed", [](Mixture& self, int64_t i) { checked(self, i).changed(i); })
        .def("victim", &victim);
}

}  // namespace moei
