"""Recorded routing: the trace file, read memory-mapped, written and validated, and a look into its future."""

from moei_core.trace.format import Trace, TraceEvent, read_trace, write_trace
from moei_core.trace.next_use import next_uses
from moei_core.trace.writer import TraceWriter

__all__ = ["Trace", "TraceEvent", "TraceWriter", "next_uses", "read_trace", "write_trace"]
