"""Replays traces through the brain: the only replay loop, the cost model, baselines, sweeps."""
