"""How weights are stored in blocks, and the native kernels that compute with them."""
