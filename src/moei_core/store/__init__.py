"""Where the bytes of experts are, and how they get into a slot."""
