"""How a transformers model is built without its experts, and how its experts are made to run through us."""
