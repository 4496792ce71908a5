"""The ``moei`` command: one Typer application, one file a command, one place that catches errors.

Nothing here or at the top of a command's file imports torch or transformers, so ``moei --help`` is instant.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moei_cli.commands import COMMANDS
from moei_core import __version__
from moei_core.errors import DoesNotFitError, MoeiError, UsageError

app = typer.Typer(
    name="moei",
    help="Chat with a Mixture-of-Experts model that is larger than your machine.",
    epilog="Start with: moei chat        Exit codes: 0 fine, 1 failure, 2 usage, 3 not found or gated, "
    "4 does not fit, 5 offline, 6 damaged files, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moei {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    return


for _register in COMMANDS:
    _register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run the command line, turn errors into sentences and exit codes."""
    _open_closed_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    # --debug is understood anywhere, since people add it to the end of the command that has just failed.
    own = [one for one in arguments[:end] if one != "--debug"]
    debug = len(own) < end
    arguments = own + arguments[end:]
    try:
        app(args=arguments, prog_name="moei")
    except MoeiError as error:
        if debug:
            raise
        _print_error(error)
        _exit(error.exit_code)
    except SystemExit as stop:
        # Typer makes its own silent exit of a Ctrl-C. Who stopped with a word of their own did not raise one.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            print("Interrupted.", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        # Before Typer has begun: building the commands takes a tenth of a second.
        print("Interrupted.", file=sys.stderr)
        _exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`moei ... | head`); there is nobody left to tell.
        _drop_output()
        _exit(1)
    except OSError as error:
        if debug:
            raise
        failure = _refused_by_the_system(error)
        _print_error(failure)
        _drop_output()
        _exit(failure.exit_code)
    except Exception as error:
        if debug:
            raise
        failure = MoeiError(
            f"moei failed: {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}",
            "This is a bug of moei, not of what you typed.",
            "Run the same command with --debug for the traceback, and please report it.",
        )
        _print_error(failure)
        _exit(1)


def _open_closed_streams() -> None:
    """A shell's ``<&-`` or ``2>&-``, or a service manager, leaves None where Python has its streams."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _drop_output() -> None:
    """What is still in our buffer cannot be written, and must not be tried again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused_by_the_system(error: OSError) -> MoeiError:
    what = f"{error.filename or 'Reading or writing'}: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DoesNotFitError(what, hint="Make room, and run the same command again.")
    return MoeiError(what, "The system refused it.", "Run the same command with --debug for the traceback.")


def _print_error(error: MoeiError) -> None:
    first, *rest = error.lines()
    prefix = "usage" if isinstance(error, UsageError) else "error"
    print("\n".join([f"{prefix}: {first}", *rest]), file=sys.stderr)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
