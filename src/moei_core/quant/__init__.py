"""Number formats of weights, how rows of blocks are laid out, and the native kernels that compute with them."""
