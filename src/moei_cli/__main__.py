"""What the ``moei`` command starts with, and ``python -m moei_cli``: a Ctrl-C while it is imported is no traceback."""

from __future__ import annotations

import sys


def run() -> None:
    """As ``main.main``."""
    try:
        from moei_cli.main import main
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
