"""``TransformersAdapter``: the hook into transformers' experts interface, verified after installing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from moei_core.adapters.base import ExpertsRuntime, NothingResident
from moei_core.adapters.checkpoint import check_shapes, join_fp8, join_mxfp4, read_tensors, take_apart
from moei_core.adapters.dense_clock import Timed, time_leaves
from moei_core.adapters.dense_linear import use_native_linears
from moei_core.adapters.early_router import EarlyRouters
from moei_core.adapters.kept_blocks import find_kept, give_up_read_ones
from moei_core.adapters.latent_attention import latent_attention_modules, use_native_latent_attention
from moei_core.adapters.native_decode import (
    ModuleCall,
    attention_modules,
    use_native_attention,
    use_native_norms,
)
from moei_core.adapters.native_ffn import use_native_ffns
from moei_core.adapters.native_layer import LayerTrial, layer_modules, use_native_layers, use_native_routers
from moei_core.adapters.skeleton import (
    TORCH_DTYPES,
    build_skeleton,
    dense_nbytes,
    experts_modules,
    load_dense_weights,
)
from moei_core.adapters.transformers_private import (
    IMPLEMENTATION,
    register_experts_function,
    wrap_attention,
)
from moei_core.errors import DamagedFileError, ModelNotFoundError, MoeiError, UnsupportedModelError
from moei_core.hub.runnable import quant_method
from moei_core.quant import READ_QUANTISATIONS
from moei_core.quant.formats import FLOAT_FORMATS, FORMATS
from moei_core.store.base import ExpertStore, StoredTensor
from moei_core.store.packed_folder import is_packed
from moei_core.store.packed_manifest import Manifest, PackedSource, read_manifest
from moei_core.store.packed_store import PackedStore
from moei_core.store.packing import PackSource
from moei_core.store.safetensors_header import TensorEntry
from moei_core.store.safetensors_store import SafetensorsStore
from moei_core.types import ExpertKey, ModelSpec

_installed: WeakKeyDictionary[nn.Module, tuple[ExpertsRuntime, int]] = WeakKeyDictionary()


def _run_installed(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls in place of a layer's experts."""
    runtime, layer = _installed[module]
    return runtime.run_layer(module, layer, hidden_states, top_k_index, top_k_weights)


register_experts_function(_run_installed)
wrap_attention(Timed)


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration. Raises: ModelNotFoundError, DamagedFileError, UnsupportedModelError."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelNotFoundError(
            f"There is no model in {folder}.",
            "It has no config.json.",
            "Give the folder of a Hugging Face model, or the name of one: moei chat moei-demo",
        )
    try:
        model_type = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedFileError(
            f"{path} is damaged.",
            "It is no JSON object with a 'model_type'.",
            "Remove the model and pull it again: a pull alone keeps a file that has its size.",
        ) from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # transformers raises many types here; all mean that this configuration cannot be used.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"The configuration of '{model_type}' cannot be used.", first, "Check the model's config.json."
        ) from error
    method = quant_method(config.to_dict())
    if method not in READ_QUANTISATIONS:
        raise UnsupportedModelError(
            f"The weights are quantised with {method}, which moei does not read yet.",
            "It reads floats, MXFP4 as gpt-oss has it, FP8 as DeepSeek-V3 has it, and what `moei quantize` packs.",
            "Use a bf16 version of the model.",
        )
    assert isinstance(config, PretrainedConfig)
    return config


class TransformersAdapter:
    """A causal language model from a local folder, its experts left on disk.

    The folder holds safetensors weights, or a packed store (``packed`` is then its manifest).

    ``__init__`` reads only configuration and file headers; ``load`` brings in the dense weights and proves that
    every MoE layer runs through the hook. Between ``install`` and ``uninstall`` the experts are the runtime's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, native_dense: bool = True) -> None:
        """dtype: compute in this float type instead of the checkpoint's own. native_dense: whether the dense part is
        the native kernels' from the start; torch's kernels on a GPU want it as floats."""
        self.folder = folder
        self.config = read_config(folder)
        self.packed: Manifest | None = read_manifest(folder) if is_packed(folder) else None
        tensors = read_tensors(folder) if self.packed is None else self.packed.dense_entries(folder)
        method = "" if self.packed is not None else quant_method(self.config.to_dict())
        if method == "mxfp4":
            tensors = join_mxfp4(tensors)
        elif method == "fp8":
            tensors = join_fp8(tensors, self.config.quantization_config)
        self._only_packs = any(entry.grid is not None for entry in tensors.values())
        stored = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else _first_dtype(tensors)
        self.dtype = dtype or stored
        self.model = build_skeleton(self.config, self.dtype)
        parameters = {
            f"{path}.{name}": layer
            for path, layer, module in experts_modules(self.model)
            for name, _ in module.named_parameters(recurse=False)
        }
        self._expert_parameters = tuple(parameters)
        self.experts: dict[ExpertKey, list[StoredTensor]]
        self._dense: Mapping[str, TensorEntry]
        if self.packed is None:
            checkpoint = take_apart(self.model, parameters, tensors)
            self.experts, self._dense, self._routers = (
                checkpoint.experts,
                checkpoint.dense,
                checkpoint.routers,
            )
        else:
            self.experts, self._dense = self.packed.stored_experts(folder), tensors
            check_shapes(self.model, parameters, self.experts)
        self._native_dense = native_dense
        self._kept = find_kept(self.model, self._dense, parameters) if native_dense else {}
        self._calls: dict[nn.Module, ModuleCall] = {}
        self._previous: str | None = None
        self._spec = self._make_spec()

    def _make_spec(self) -> ModelSpec:
        counts: dict[int, int] = {}
        nbytes: dict[int, int] = {}
        for key, stored in sorted(self.experts.items()):
            counts[key.layer] = counts.get(key.layer, 0) + 1
            nbytes[key.layer] = sum(tensor.nbytes for tensor in stored)
        text = self.config.get_text_config()
        # Families call it differently; ``load`` replaces it by what the routers really choose.
        top_k = getattr(text, "num_experts_per_tok", None) or 1
        return ModelSpec(self.config.model_type, counts, top_k, text.hidden_size, nbytes)

    def spec(self) -> ModelSpec:
        """The shape of the model's routed experts."""
        return self._spec

    @property
    def expected_dense_nbytes(self) -> int:
        """Bytes of the dense weights once loaded, known before loading (an upper bound: tied weights)."""
        item = self.dtype.itemsize
        kept = sum(one.matrix.nbytes for one in self._kept.values())
        return kept + sum(
            math.prod(entry.shape) * item if entry.dtype in FORMATS else entry.nbytes
            for name, entry in self._dense.items()
            if name not in self._kept
        )

    def open_store(self) -> ExpertStore:
        """The experts' bytes. Raises: DamagedFileError; UnsupportedModelError for what must be packed first."""
        if self.packed is not None:
            return PackedStore(self.folder, self.packed)
        if self._only_packs:
            raise UnsupportedModelError(
                "The model is published in FP8, which moei reads to pack it and cannot run as it is.",
                "",
                "Once: moei quantize MODEL q8_0 (or q4_0). Then: moei chat MODEL:q8_0",
            )
        return SafetensorsStore(self.experts)

    def pack_source(self, source: PackedSource) -> PackSource:
        """This checkpoint as packing needs it. Not for a model that is packed already, nor after ``load``."""
        assert self.packed is None
        transposed = {layer: bool(module.is_transposed) for _, layer, module in experts_modules(self.model)}
        return PackSource(source, self.experts, transposed, self._dense, self._routers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the loaded model holds."""
        return dense_nbytes(self.model)

    def load(self) -> None:
        """Read the dense weights, and prove that every MoE layer would run through a runtime.

        The expert parameters are gone from the modules from here on. Raises: UnsupportedModelError, DamagedFileError.
        """
        load_dense_weights(self.model, self._dense, self.dtype, self._expert_parameters, self._kept)
        hooks = [
            module.register_forward_pre_hook(_note_call(self._calls), with_kwargs=True)
            for module in (
                *attention_modules(self.model),
                *latent_attention_modules(self.model),
                *layer_modules(self.model),
            )
        ]
        try:
            top_k = max(self._probe().values())
        finally:
            for hook in hooks:
                hook.remove()
        give_up_read_ones(self.model)
        if self._native_dense:
            self.compute_natively()
        self._spec = replace(self._spec, num_experts_per_tok=top_k)

    def compute_natively(self) -> None:
        """From here on norms, routers, attention and dense products of few tokens are the native kernels', in RAM."""
        use_native_linears(self.model)
        trial = LayerTrial()
        self.install(trial)
        try:
            with torch.inference_mode():
                use_native_norms(self.model)
                use_native_routers(self.model)
                use_native_ffns(self.model, self.dtype)
                use_native_attention(self._calls, self.dtype)
                use_native_latent_attention(self.model, self._calls, self.dtype)
                use_native_layers(self.model, self._calls, _installed.get, trial)
        finally:
            self.uninstall()

    def time_dense(self) -> None:
        """From here on ``DENSE_CLOCK`` sees all modules that are computed in RAM.

        In decoding it does not see what model code writes out between modules: turning queries and keys, sums, an
        attention in plain torch. The native kernels and torch's fused attention it sees from the start.
        """
        if self.model.device.type == "cpu":
            time_leaves(self.model, [module for _, _, module in experts_modules(self.model)])

    def _probe(self) -> dict[int, int]:
        """The top-k of each MoE layer, from one token through experts that only say that they ran.

        Raises: UnsupportedModelError if a layer does not run through the hook, or holds expert weights.
        """
        probe = _Probe()
        self.install(probe)
        try:
            for _, layer, module in experts_modules(self.model):
                left = [name for name, _ in module.named_parameters(recurse=False)]
                if left:
                    raise self._refuse(f"Expert weights are left in layer {layer} ({left[0]}).")
            with torch.inference_mode():
                self.model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
            silent = sorted(set(self._spec.moe_layers) - set(probe.top_k))
            if silent:
                raise self._refuse(
                    f"The experts of layer {silent[0]} do not run through the experts interface."
                )
        except MoeiError:
            raise
        except Exception as error:
            raise self._refuse(f"A trial run failed: {type(error).__name__}: {error}") from error
        finally:
            self.uninstall()
        return probe.top_k

    def install(self, runtime: ExpertsRuntime) -> None:
        """Make every MoE layer run through ``runtime``."""
        self._previous = getattr(self.model.config, "_experts_implementation", None)
        self.model.set_experts_implementation(IMPLEMENTATION)
        for _, layer, module in experts_modules(self.model):
            _installed[module] = (runtime, layer)

    def uninstall(self) -> None:
        """Give the model back as it was before ``install``."""
        for _, _, module in experts_modules(self.model):
            _installed.pop(module, None)
        if self._previous is not None:
            self.model.set_experts_implementation(self._previous)

    def release(self) -> None:
        """The model will not run again: let its weights go with the last reference to it.

        A module and the native function that stands in its place hold each other, and the garbage collector finds
        that when it looks: gigabytes would stay, and be freed while another model runs.
        """
        for module in self.model.modules():
            module.__dict__.pop("forward", None)

    @contextmanager
    def instead(self, runtime: ExpertsRuntime) -> Iterator[None]:
        """For a while every MoE layer runs through ``runtime``, and then through the one that is installed."""
        before = {module: _installed[module] for _, _, module in experts_modules(self.model)}
        _installed.update({module: (runtime, layer) for module, (_, layer) in before.items()})
        try:
            yield
        finally:
            _installed.update(before)

    def early_routers(self) -> EarlyRouters:
        """The layers' own routers, for hints. After ``load``, and not while a runtime is installed."""

        def run_token() -> dict[int, torch.Tensor]:
            probe = _Probe()
            self.install(probe)
            try:
                with torch.inference_mode():
                    self.model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
            finally:
                self.uninstall()
            return probe.chosen

        return EarlyRouters(self.model, run_token)

    def _refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"The architecture {type(self.model).__name__} is not supported.",
            why,
            "Please report it with the model's name.",
        )


def _note_call(calls: dict[nn.Module, ModuleCall]) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
    def note(module: nn.Module, given: Any, arguments: dict[str, Any]) -> None:
        # The hidden states are all that may come without a name.
        if len(given) + ("hidden_states" in arguments) == 1:
            rest = {name: value for name, value in arguments.items() if name != "hidden_states"}
            calls[module] = ModuleCall(rest)

    return note


class _Probe(NothingResident):
    """An ``ExpertsRuntime`` that notes what each layer that ran had chosen, and contributes nothing."""

    def __init__(self) -> None:
        self.top_k: dict[int, int] = {}
        self.chosen: dict[int, torch.Tensor] = {}

    def run_layer(
        self,
        module: nn.Module,
        layer: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        if meanwhile is not None:
            meanwhile()
        self.top_k[layer], self.chosen[layer] = top_k_index.shape[-1], top_k_index
        return torch.zeros_like(hidden_states)


def _first_dtype(tensors: Mapping[str, Any]) -> torch.dtype:
    return next((TORCH_DTYPES[t.dtype] for t in tensors.values() if t.dtype in FLOAT_FORMATS), torch.float32)
