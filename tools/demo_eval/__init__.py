"""Held-out questions for the demonstration model, and the measures taken on it."""
