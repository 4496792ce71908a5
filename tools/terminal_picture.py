"""Turn a captured terminal screen into an SVG picture for the README.

tmux capture-pane -e -p -t NAME | python tools/terminal_picture.py docs/chat.svg "moei chat"
"""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> None:
    path, title = sys.argv[1:]
    lines = sys.stdin.read().rstrip().splitlines()
    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115, PTH123
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    svg = console.export_svg(title=title)
    # The picture must not fetch fonts: any monospaced one will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace(
        "Fira Code, monospace", "monospace"
    )
    with open(path, "w", encoding="utf-8") as stream:  # noqa: PTH123
        stream.write(svg)


if __name__ == "__main__":
    main()
