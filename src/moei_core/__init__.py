"""The engine and the brain of moei: caching, prefetching, moving and computing experts.

The rooms and what each may import are listed in ``docs/architecture.md`` and held by import-linter.
"""

__version__ = "0.1.0"
