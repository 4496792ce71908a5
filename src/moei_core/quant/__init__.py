"""Number formats of weights, how rows of blocks are laid out, and the native kernels that compute with them."""

READ_QUANTISATIONS = ("", "mxfp4", "fp8")
"""Values of ``quant_method`` in configs of checkpoints that can be read, FP8 to be packed; empty: not quantised."""
