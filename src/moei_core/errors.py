"""The error tree. Every failure that a person can meet has a type, a sentence and a next step.

``what`` says what happened, ``why`` the cause, ``hint`` what to do next; the command line prints them in at
most three lines and exits with ``exit_code``. Anything else that escapes is a bug of moei.
"""

from __future__ import annotations


class MoeiError(Exception):
    """Base of all errors that moei raises on purpose."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def lines(self) -> list[str]:
        """The one to three lines that a person reads."""
        return [line for line in (self.what, self.why, self.hint) if line]

    def __str__(self) -> str:
        return " ".join(self.lines())


class UsageError(MoeiError):
    """An option, a setting or a value that moei does not know or cannot combine."""

    exit_code = 2


class ModelNotFoundError(MoeiError):
    """The model does not exist, is not here, or is gated."""

    exit_code = 3


class UnsupportedModelError(MoeiError):
    """The model is not a Mixture-of-Experts model that moei can run."""

    exit_code = 1


class DoesNotFitError(MoeiError):
    """A memory or disk budget is too small. The hint names the smallest that works.

    smallest_slots: the expert slots of the smallest budget that works, where the budget is one of experts.
    """

    exit_code = 4

    def __init__(self, what: str, why: str = "", hint: str = "", smallest_slots: int | None = None) -> None:
        super().__init__(what, why, hint)
        self.smallest_slots = smallest_slots


class OfflineError(MoeiError):
    """Something must be downloaded and the network may not or cannot be used."""

    exit_code = 5


class DamagedFileError(MoeiError):
    """A file of the model is missing, truncated, swapped or has other bytes than before."""

    exit_code = 6


class ExpertReadError(MoeiError):
    """The bytes of an expert could not be read in the middle of a turn. The turn is lost, nothing else."""

    exit_code = 6


class InterruptedTurnError(MoeiError):
    """The person stopped the turn before its first token; the conversation is as it was before the turn."""

    exit_code = 130
