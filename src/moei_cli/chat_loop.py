"""The interactive chat: reads lines, runs slash commands, shows replies."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from moei_cli import render
from moei_cli.forecasts import Prediction, actual_of
from moei_cli.interrupts import stopping_on_interrupt
from moei_core.config import GenerationSettings
from moei_core.engine.chat_session import ChatSession
from moei_core.errors import MoeiError, UsageError
from moei_core.paths import state_dir

_BLOCK = '"""'


class ChatLoop:
    """One person at one terminal."""

    def __init__(self, session: ChatSession, name: str, prediction: Prediction | None = None) -> None:
        """prediction: written before the chat; the first reply of some length is set beside it."""
        self._session = session
        self._name = name
        self._prediction = prediction
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "what you can type here"),
            "/stats": (self._stats, "what the expert cache has done, and where the time went"),
            "/set": (self._set, "show the settings, or change one: /set temperature 0"),
            "/clear": (self._clear, "forget the conversation"),
            "/bye": (self._bye, "leave (as does Ctrl-D)"),
        }
        self._input: PromptSession[str] = PromptSession(
            history=_history(),
            completer=WordCompleter(list(self._commands), sentence=True),
            complete_while_typing=False,
        )
        self._leaving = False

    def run(self) -> None:
        """Until the person leaves."""
        render.note("Ask something, or type /help.")
        interrupted = False
        while not self._leaving:
            try:
                text = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                render.note("Ctrl-C again leaves, as does /bye.")
                continue
            interrupted = False
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self._command(text)
                else:
                    self._ask(text)
            except MoeiError as error:
                render.problem(error)

    def _read(self) -> str:
        text = self._input.prompt(">>> ")
        while text.lstrip().startswith(_BLOCK) and text.count(_BLOCK) < 2:
            text += "\n" + self._input.prompt("... ")
        return text.strip().removeprefix(_BLOCK).removesuffix(_BLOCK).strip()

    def _ask(self, text: str) -> None:
        with stopping_on_interrupt(self._session.stop):
            render.show_reply(self._session.reply(text), self._session)
        if (
            self._prediction is not None
            and self._prediction.actual is None
            and self._session.report is not None
        ):
            # The prompt's length was not known beforehand, so only the speed can be compared.
            actual = actual_of(self._session.report, self._session.model, cold=False)
            if actual.tokens_per_s is not None:
                self._prediction.settle(actual)
                render.note(f"{self._prediction.beside[0].upper()}{self._prediction.beside[1:]}.")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"There is no command {name}.", hint=f"{hint}/help lists them all.")
        self._commands[name][0](rest.strip())

    def _help(self, _: str) -> None:
        render.key_values({name: what for name, (_, what) in self._commands.items()})
        render.note('Several lines: paste them, or put them between """ and """. Ctrl-C stops a reply.')

    def _stats(self, _: str) -> None:
        render.statistics(self._session)
        if self._prediction is not None:
            render.note(self._prediction.beside)

    def _clear(self, _: str) -> None:
        self._session.clear()
        render.note("The conversation is empty; the expert cache stays warm.")

    def _bye(self, _: str) -> None:
        self._leaving = True

    def _set(self, rest: str) -> None:
        settings = self._session.settings
        if not rest:
            shown = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
            render.key_values({**shown, "thinking": repr(self._session.thinking)})
            return
        name, _, value = rest.partition(" ")
        if name == "thinking":
            choices = {"on": True, "off": False, "auto": None}
            if value not in choices:
                raise UsageError("thinking is on, off or auto.")
            self._session.thinking = choices[value]
        else:
            self._session.settings = replace(settings, **{name: _parse(name, value.strip())})
        render.note(f"{name} = {value}")


def _parse(name: str, value: str) -> object:
    """A value of ``GenerationSettings`` from its text. Raises: UsageError naming the choices."""
    types = {field.name: str(field.type) for field in fields(GenerationSettings)}
    if name not in types:
        raise UsageError(
            f"There is no setting '{name}'.", hint=f"There are: {', '.join([*types, 'thinking'])}."
        )
    if name == "stop":
        return (value,) if value and value != "none" else ()
    if value == "none" and "None" in types[name]:
        return None
    try:
        return float(value) if "float" in types[name] else int(value)
    except ValueError:
        raise UsageError(f"{name} is a number, not '{value}'.", hint=f"For example: /set {name} 1") from None


def _history() -> History:
    """Persistent, unless the home cannot be written."""
    path: Path = state_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
