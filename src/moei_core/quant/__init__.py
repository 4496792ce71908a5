"""Number formats of weights: what their bytes mean, and how rows of blocks are laid out."""
