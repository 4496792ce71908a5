"""The command line and the hub on loopback, as in their own tests."""

from tests.cli.conftest import moei
from tests.hub.conftest import place

__all__ = ["moei", "place"]
