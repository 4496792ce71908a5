"""Model names, downloads, and the library of models on this machine."""
