"""Carrying plans out: slots, reads, expert products, generation."""
