"""What a format means for a forecast: its size, and its speed where no kernel was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """bits: of one weight, scales included. share: of the memory's read bandwidth that a product of one row reaches
    where none was measured: plain numbers .6 (torch on processors of this kind), blocks of 8 bits .9, and
    blocks of 4 bits .6 to .7, since unpacking them keeps the processor busy. runs: or is only read to be packed."""

    name: str
    bits: float
    share: float
    runs: bool = True

    def nbytes(self, weights: int) -> int:
        """Bytes of so many weights."""
        return round(weights * self.bits / 8)


FORMATS = {
    one.name: one
    for one in (
        StorageFormat("f32", 32, 0.6),
        StorageFormat("bf16", 16, 0.6),
        StorageFormat("f16", 16, 0.6),
        StorageFormat("fp8", 8, 0.6, runs=False),
        StorageFormat("q8_0", 8.5, 0.9),
        StorageFormat("q4_0", 4.5, 0.6),
        StorageFormat("mxfp4", 4.25, 0.7),
        StorageFormat("q4_k", 4.5, 0.2),
        StorageFormat("q5_k", 5.5, 0.2),
        StorageFormat("q6_k", 6.5625, 0.2),
    )
}
"""q8_0 and q4_0: blocks of 32 weights with a 16-bit scale (GGUF); mxfp4: blocks of 32 with an 8-bit scale (OCP); q4_k,
q5_k, q6_k: blocks of 256 with scales of their parts (GGUF)."""

QUANTISED = ("q8_0", "q4_0")
"""What a model can be packed to, the larger first."""

_STORED = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F8_E4M3": "fp8", "U8": "mxfp4"}
_STORED |= {name.upper(): name for name in ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")}


def stored_format(dtype: str) -> str:
    """Our name of safetensors' ``dtype``; bf16 for one that is not known."""
    return _STORED.get(dtype.upper(), "bf16")
