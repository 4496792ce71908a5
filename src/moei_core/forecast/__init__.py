"""What to expect of a model on a machine, before and after it ran."""
