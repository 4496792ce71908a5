"""Ranges of files that a tensor refers to, its scales above all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileRange:
    """Some bytes of a file."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Scales of a matrix, one for each ``square`` [rows, columns] of it, see ``moei_core.quant.fp8``.

    format: of the scales. shape: [rows, columns] of them.
    """

    place: FileRange
    format: str
    shape: tuple[int, int]
    square: tuple[int, int]

    def share(self, number: int, of: int) -> ScaleGrid:
        """The scales of one of ``of`` matrices that lie one after the other."""
        nbytes, rows = self.place.nbytes // of, self.shape[0] // of
        place = FileRange(self.place.file, self.place.offset + number * nbytes, nbytes)
        return ScaleGrid(place, self.format, (rows, self.shape[1]), self.square)
