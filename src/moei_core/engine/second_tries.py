"""Reading with one retry: a disk may fail once and answer the second time. What failed is returned, not raised."""

from __future__ import annotations

from moei_core.errors import ExpertReadError
from moei_core.store.base import ExpertStore, Extent, read_expert
from moei_core.store.checksums import RunningChecksum
from moei_core.types import ExpertKey


def read_chunk(store: ExpertStore, key: ExpertKey, chunk: Extent, slot: memoryview) -> Exception | None:
    """Read a part of an expert. Returns what the second try raised."""
    for last in (False, True):
        try:
            store.read_extent(key, chunk, slot)
            break
        except Exception as failure:
            if last:
                return failure
    return None


def complete(
    store: ExpertStore, key: ExpertKey, slot: memoryview, running: RunningChecksum
) -> Exception | None:
    """Compare with the checksum; a second reading may heal what the first one spoilt on the way. Returns what could
    not be healed."""
    try:
        store.complete(key, slot, running)
    except ExpertReadError:
        try:
            read_expert(store, key, slot)
        except Exception as failure:
            return failure
    except Exception as failure:
        # No matter of the disk, as memory is; a reader that died of it would leave everybody waiting.
        return failure
    return None
