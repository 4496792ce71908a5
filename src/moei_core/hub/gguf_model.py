"""A GGUF file as a model: its weights stay where they are, and a folder of moei's cache holds what else a model has: a
config, a tokenizer, and a table of the tensors under transformers' names.

Read as ``gguf`` (of llama.cpp's authors) reads it; the format is in ggml's ``docs/gguf.md``, the names of keys and
tensors are those of ``gguf.constants``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moei_core.errors import DamagedFileError, ModelNotFoundError, UnsupportedModelError
from moei_core.paths import cache_dir
from moei_core.store.gguf_table import is_gguf_folder, read_table, write_table
from moei_core.store.safetensors_header import TensorEntry

_VERSION = 1
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}

_PIECES = {
    # Contractions, words, single digits, punctuation, line ends, spaces.
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
}
"""Into what a text is cut before its bytes are merged, by ``tokenizer.ggml.pre``."""
_CONTROL, _USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``."""

Facts = Callable[..., Any]


def gguf_folder(path: Path) -> Path:
    """The folder of the model in the GGUF file ``path``, or whose first part that is; made if it is not there.

    Raises: ModelNotFoundError, DamagedFileError, UnsupportedModelError for an architecture or a tokenizer that is not
    known, OSError.
    """
    files = _parts(path.expanduser().absolute())
    identity = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = hashlib.sha256(json.dumps([_VERSION, identity]).encode()).hexdigest()[:16]
    folder = cache_dir() / "gguf" / f"{path.stem}-{name}"
    if not is_gguf_folder(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            _make(files, made)
            _forget_others(path.stem, folder.parent)
            try:
                made.rename(folder)
            except OSError:
                # Somebody else may have made it meanwhile.
                if not is_gguf_folder(folder):
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _forget_others(stem: str, parent: Path) -> None:
    """Folders of files that are gone or have changed mean nothing any more."""
    for folder in parent.glob(f"{glob.escape(stem)}-*"):
        try:
            read_table(folder)
        except DamagedFileError:
            shutil.rmtree(folder, ignore_errors=True)


def _parts(path: Path) -> list[Path]:
    """All files of the model. Raises: ModelNotFoundError."""
    found = _PART.fullmatch(path.name)
    names = [path.name]
    if found is not None:
        count = int(found[3])
        names = [f"{found[1]}-{number:05d}-of-{found[3]}.gguf" for number in range(1, count + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            raise ModelNotFoundError(f"There is no file {path.parent / name}.", hint="Check the path.")
    return [path.parent / name for name in names]


def _make(files: list[Path], folder: Path) -> None:
    readers = [_open(file) for file in files]
    fields = readers[0].fields

    def fact(key: str, default: Any = None) -> Any:
        field = fields.get(key.replace("ARCH", architecture))
        return default if field is None else field.contents()

    architecture = str(fields["general.architecture"].contents()) if "general.architecture" in fields else "?"
    make_config = _CONFIGS.get(architecture)
    if make_config is None or not fact("ARCH.expert_count"):
        raise UnsupportedModelError(
            f"The GGUF architecture '{architecture}' is not supported.",
            f"moei reads {', '.join(_CONFIGS)} in GGUF, and 65 architectures as safetensors.",
            "Pull the original model instead: moei pull --help",
        )
    tensors: dict[str, TensorEntry] = {}
    for file, reader in zip(files, readers, strict=True):
        for tensor in reader.tensors:
            tensors.update(_named(file, tensor))
    try:
        config = make_config(fact) | {
            "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
            "dtype": "bfloat16",
            "tie_word_embeddings": "lm_head.weight" not in tensors,
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DamagedFileError(
            f"{files[0]} does not describe its model.",
            f"What it says of it lacks something: {error}.",
            "Download it again, or look for another file of the model.",
        ) from None
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(fact, folder)
    # Last: with the table the folder counts as complete.
    write_table(folder, tensors)


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedFileError(
            f"{file} is no complete GGUF file.", f"{first}.", "Download it again, or check the path."
        ) from None


def _named(file: Path, tensor: Any) -> Iterator[tuple[str, TensorEntry]]:
    """The entries that a GGUF tensor is for transformers: one, or one for each expert."""
    from moei_core.quant.formats import FORMATS

    form, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if form not in FORMATS:
        raise UnsupportedModelError(
            f"{file.name} is stored in {form}, which moei does not read.",
            f"Found at '{tensor.name}'; known are {', '.join(FORMATS)}.",
            "Look for a file in Q4_K_M, Q5_K_M, Q6_K, Q8_0 or Q4_0.",
        )
    layer, _, rest = (
        tensor.name.removeprefix("blk.").partition(".") if tensor.name.startswith("blk.") else ("",) * 3
    )
    module, _, leaf = (rest or tensor.name).rpartition(".")
    at = f"model.layers.{layer}." if layer else ""
    if module in _EXPERTS and leaf == "weight" and len(shape) == 3:
        each = nbytes // shape[0]
        for expert in range(shape[0]):
            name = f"{at}mlp.experts.{expert}.{_EXPERTS[module]}.weight"
            yield name, TensorEntry(file, form, shape[1:], offset + expert * each, each)
        return
    if module not in _NAMES:
        raise UnsupportedModelError(
            f"{file.name} holds a tensor that moei does not know: '{tensor.name}'.",
            hint="Pull the original model instead: moei pull --help",
        )
    if module == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    yield f"{at}{_NAMES[module]}.{leaf}", TensorEntry(file, form, shape, offset, nbytes)


def _config(fact: Facts) -> dict[str, Any]:
    """What configs of all architectures have. Raises: UnsupportedModelError for an unknown scaling of positions."""
    heads, hidden = fact("ARCH.attention.head_count"), fact("ARCH.embedding_length")
    scaling = fact("ARCH.rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(fact("ARCH.rope.freq_base", 10000.0))}
    if scaling == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": float(fact("ARCH.rope.scaling.factor")),
            "original_max_position_embeddings": fact("ARCH.rope.scaling.original_context_length"),
        }
    elif scaling != "none":
        raise UnsupportedModelError(
            f"The GGUF file scales positions in a way that moei does not know: {scaling}.",
            hint="Pull the original model instead: moei pull --help",
        )
    return {
        "hidden_size": hidden,
        "num_hidden_layers": fact("ARCH.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact("ARCH.attention.head_count_kv", heads),
        "head_dim": fact("ARCH.attention.key_length", hidden // heads),
        "intermediate_size": fact("ARCH.feed_forward_length", hidden),
        "moe_intermediate_size": fact("ARCH.expert_feed_forward_length"),
        "num_experts": fact("ARCH.expert_count"),
        "num_experts_per_tok": fact("ARCH.expert_used_count"),
        "rms_norm_eps": float(fact("ARCH.attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": fact("ARCH.context_length"),
        "rope_parameters": rope,
        "bos_token_id": fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fact("tokenizer.ggml.eos_token_id"),
    }


def _qwen3(fact: Facts) -> dict[str, Any]:
    return _config(fact) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
    }


def _qwen2(fact: Facts) -> dict[str, Any]:
    return _config(fact) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": fact("ARCH.expert_shared_feed_forward_length"),
    }


_CONFIGS: dict[str, Callable[[Facts], dict[str, Any]]] = {"qwen3moe": _qwen3, "qwen2moe": _qwen2}


def _write_tokenizer(fact: Facts, folder: Path) -> None:
    """``tokenizer.json`` and its config. Raises: UnsupportedModelError."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, pre = fact("tokenizer.ggml.model"), fact("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PIECES:
        raise UnsupportedModelError(
            f"The GGUF file's tokenizer is not supported: {kind}, {pre}.",
            hint="Pull the original model instead: moei pull --help",
        )
    tokens: list[str] = fact("tokenizer.ggml.tokens")
    try:
        merges = [
            (first, second) for first, second in (one.split(" ") for one in fact("tokenizer.ggml.merges", []))
        ]
        model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    except Exception as error:
        # tokenizers raises nothing more special.
        raise DamagedFileError(
            "The GGUF file's tokenizer is damaged.", f"{error}.", "Download the file again."
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PIECES[pre]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fact("tokenizer.ggml.token_type", [])
    for token, of in zip(tokens, types, strict=False):
        if of in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=of == _CONTROL, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos"):
        number = fact(f"tokenizer.ggml.{name}_token_id")
        if number is not None and number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    if (template := fact("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
