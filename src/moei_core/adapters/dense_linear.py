"""Linear layers and embeddings on the native kernels: float weights where they are, packed ones in their blocks.

Only modules that are exactly ``nn.Linear`` or ``nn.Embedding`` are replaced: a subclass may compute something else.
Model code that reads a block layer's ``weight`` instead of calling the layer gets decoded values, and is noticed.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from moei_core.quant import native
from moei_core.quant.formats import FORMATS, decode

FEW_ROWS = 4
"""Rows up to which float weights are read faster than torch reads them."""
STEADY_ROWS = 64
"""Torch prepares a 16-bit product anew for each number of rows, which takes longer than the product. So it sees few
different numbers: multiples of this. Where transformers attends over latents itself, it expands all of them at each
token, one row more each time."""
WORTH_SHARING = 256 << 10
"""Bytes of a float weight from which more than one thread, and so a kernel of ours, is worth it."""
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of the activations' types."""
_TILE_ROWS = 16


class _Unmovable(nn.Module):
    """Kernels keep addresses: moving the weights would leave them with memory that is gone."""

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError("The weights of a native layer cannot be moved or converted.")


class NativeLinear(_Unmovable, nn.Linear):
    """An ``nn.Linear`` of float weights whose products with few rows run on the native kernels, on all threads.

    Which way a product goes depends on its rows alone, and so does its result.
    """

    def __init__(self, module: nn.Linear) -> None:
        """module: gives its parameters, which must stay where they are in memory."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias
        self._type = TYPES[module.weight.dtype]
        self.kernel = _kernel(
            native.Matrix(self._type, self.out_features, self.in_features), module.weight, module.bias
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        if rows > FEW_ROWS and self.weight.dtype != torch.float32 and rows % STEADY_ROWS:
            padded = input.new_zeros((rows + -rows % STEADY_ROWS, self.in_features))
            padded[:rows] = input.reshape(rows, self.in_features)
            product = nn.functional.linear(padded, self.weight, self.bias)
            return product[:rows].view(*input.shape[:-1], self.out_features)
        if rows > FEW_ROWS or input.dtype != self.weight.dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        return _product(self.kernel, self._type, input, rows, self.out_features)


class BlockLinear(_Unmovable):
    """A linear layer whose weights stay blocks; activations of any float type, sums in float32.

    weight_reads: how often model code has asked for ``weight``, which decodes all of it.
    """

    def __init__(
        self, blocks: torch.Tensor, matrix: native.Matrix, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        """blocks: the bytes of ``matrix``. dtype: of ``weight`` for those who read it."""
        super().__init__()
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.register_buffer("blocks", blocks, persistent=False)
        self.bias = bias
        self.matrix, self.dtype, self.weight_reads = matrix, dtype, 0
        self.kernel = _kernel(matrix, blocks, bias)

    @property
    def weight(self) -> torch.Tensor:
        self.weight_reads += 1
        raw = self.get_buffer("blocks").numpy()
        matrix = self.matrix
        if matrix.order == "rows16":
            raw = native.from_rows16(matrix.format, matrix.rows, matrix.cols, raw)
        weight = torch.from_numpy(decode(matrix.format, raw, (matrix.rows, matrix.cols)))
        return weight.to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        return _product(self.kernel, TYPES[input.dtype], input, rows, self.out_features)

    def as_float(self) -> nn.Linear:
        """The same layer with its weights decoded."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight, requires_grad=False)
        plain.register_parameter("bias", self.bias)
        return plain


class BlockEmbedding(nn.Module):
    """An embedding whose rows stay blocks and are decoded when they are looked up."""

    def __init__(self, blocks: torch.Tensor, matrix: native.Matrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.cols
        self.register_buffer("blocks", blocks, persistent=False)
        self.matrix, self.dtype = matrix, dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        tokens = input.reshape(-1)
        values = native.decode(
            self.matrix.format, self._rows(tokens).reshape(-1), input.numel() * self.matrix.cols
        )
        return torch.from_numpy(values).to(self.dtype).view(*input.shape, -1)

    def _rows(self, tokens: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The plain blocks of some rows, [len(tokens), bytes of a row]."""
        blocks, matrix = self.get_buffer("blocks"), self.matrix
        if matrix.order == "plain":
            return blocks.view(matrix.rows, -1)[tokens].numpy()
        nbytes = FORMATS[matrix.format].block_nbytes
        tiles = blocks.view(-1, matrix.cols // FORMATS[matrix.format].block_size, _TILE_ROWS * nbytes)
        chosen = tiles[tokens // _TILE_ROWS].numpy()
        count, columns = chosen.shape[:2]
        each, lane = np.arange(count), tokens.numpy() % _TILE_ROWS
        # As moei_core.quant.layouts has it: the scales of 16 rows, then their quants in pieces of 4 bytes.
        scales = chosen[..., : 2 * _TILE_ROWS].reshape(count, columns, _TILE_ROWS, 2)[each, :, lane]
        pieces = chosen[..., 2 * _TILE_ROWS :].reshape(count, columns, -1, _TILE_ROWS, 4)[each, :, :, lane]
        return np.concatenate([scales, pieces.reshape(count, columns, -1)], axis=-1).reshape(count, -1)


def use_native_linears(model: nn.Module) -> None:
    """Let the float linear layers of ``model`` that are worth it run on the native kernels."""
    if not native.available():
        return
    for path, module in list(model.named_modules()):
        # Exactly nn.Linear: a subclass may compute something else.
        if type(module) is nn.Linear and worth_sharing(module):
            model.set_submodule(path, NativeLinear(module))


def worth_sharing(module: nn.Linear) -> bool:
    """Whether a float layer is large enough for a kernel of ours, and of a type that it knows."""
    weight = module.weight
    return (
        weight.dtype in TYPES
        and weight.is_contiguous()
        and weight.numel() * weight.itemsize >= WORTH_SHARING
        and (module.bias is None or module.bias.dtype in TYPES)
    )


def _kernel(matrix: native.Matrix, weight: torch.Tensor, bias: torch.Tensor | None) -> native.Linear:
    if bias is None:
        return native.Linear(matrix, weight.data_ptr())
    return native.Linear(matrix, weight.data_ptr(), TYPES[bias.dtype], bias.data_ptr())


def _product(kernel: native.Linear, type: str, input: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    if not input.is_contiguous():
        input = input.contiguous()
    out = input.new_empty((*input.shape[:-1], width))
    kernel(type, input.data_ptr(), rows, out.data_ptr())
    return out
