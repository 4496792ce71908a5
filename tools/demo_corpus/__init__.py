"""The demonstration model's corpus: plain-text facts, a question grammar and the code that mixes them."""
