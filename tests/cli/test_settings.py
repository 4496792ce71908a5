"""Flags before variables before ``config.toml`` before automatic, and refusals that say where a value is from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moei_cli.settings import AUTOMATIC, SETTINGS, config_path, resolve, resolve_all
from moei_core.errors import UsageError
from tests.cli.conftest import Outcome

Moei = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEI_HOME", str(tmp_path))
    for name in SETTINGS:
        monkeypatch.delenv(f"MOEI_{name.upper()}", raising=False)


def write(text: str) -> None:
    config_path().parent.mkdir(parents=True, exist_ok=True)
    config_path().write_text(text)


def test_nothing_is_set() -> None:
    found = resolve_all()
    assert set(found) == set(SETTINGS)
    assert all(one.text is None and one.origin == "automatic" for one in found.values())


def test_each_layer_wins_over_the_one_below(monkeypatch: pytest.MonkeyPatch) -> None:
    write('ram = "8GiB"\nexperts = "50%"\ncontext = 512\n')
    monkeypatch.setenv("MOEI_RAM", "6GiB")
    monkeypatch.setenv("MOEI_EXPERTS", "30%")
    found = resolve(ram="4GiB", experts=None, context=None, policy=None)
    assert (found["ram"].text, found["ram"].origin) == ("4GiB", "--ram")
    assert (found["experts"].text, found["experts"].origin) == ("30%", "MOEI_EXPERTS")
    assert (found["context"].text, found["context"].origin) == ("512", str(config_path()))
    assert (found["policy"].text, found["policy"].origin) == (None, "automatic")
    # A variable that is empty is as good as none.
    monkeypatch.setenv("MOEI_EXPERTS", "")
    assert resolve(experts=None)["experts"].text == "50%"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('memory = "8GiB"', "memory is no setting"),
        ('ram = "much"', "ram"),
        ("ram = true", "ram = True is neither"),
        ("context = 3", "context: 3 tokens are too few"),
        ("context = 'x'", "context: 'x' is not a number of tokens"),
        ("[chat]\nram = 1", "chat is no setting"),
        ('policy = "best"', "policy: there is no cache policy 'best'"),
        ('prefetch = "maybe"', "prefetch: there is no 'maybe'"),
        ('predictor = "stride"', "predictor stride must be trained"),
        ("ram = ", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, sentence: str) -> None:
    write(text)
    with pytest.raises(UsageError) as refused:
        resolve_all()
    assert str(config_path()) in str(refused.value)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAM", "lots"),
        ("EXPERTS", "120%"),
        ("CONTEXT", "-1"),
        ("POLICY", "x"),
        ("PREFETCH", "y"),
        ("DEVICE", "gpu"),
        ("VRAM", "8 apples"),
        ("MISSES", "z"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MOEI_{name}", value)
    with pytest.raises(UsageError, match=f"MOEI_{name}: "):
        resolve_all()


def test_a_mistyped_variable_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEI_EXPERT", "25%")
    with pytest.raises(UsageError, match=r"MOEI_EXPERT means nothing.*set MOEI_EXPERTS instead"):
        resolve_all()


def test_an_error_says_where_the_value_of_a_flag_comes_from(
    moei: Moei, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("context = 99999\n")
    for command in (("chat", "moei-demo", "hello"), ("show", "moei-demo", "--settings")):
        done = moei(*command)
        assert done.code == 2
        assert "--context 99999 is out of range" in done.err
        assert f"{config_path()} sets context to 99999." in done.err
    assert "sets context" not in moei("chat", "moei-demo", "hello", "--context", "99999").err
    monkeypatch.setenv("MOEI_CONTEXT", "256")
    monkeypatch.setenv("MOEI_VRAM", "1GiB")
    done = moei("chat", "moei-demo", "hello", "--device", "cpu")
    assert done.code == 2
    assert "--vram needs a GPU" in done.err
    assert "MOEI_VRAM sets vram to 1GiB." in done.err


def test_a_home_that_is_a_file_has_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEI_HOME", str(tmp_path / "file"))
    assert resolve_all() == dict.fromkeys(SETTINGS, AUTOMATIC)


def test_a_chat_follows_them(moei: Moei, monkeypatch: pytest.MonkeyPatch) -> None:
    write('experts = "50%"\ncontext = 256\npolicy = "global-lru"\n')
    done = moei("chat", "moei-demo", "Hello", "--max-tokens", "2", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["experts"]["slots"] == 64
    assert report["experts"]["policy"] == "global-lru"
    monkeypatch.setenv("MOEI_EXPERTS", "25%")
    done = moei("chat", "moei-demo", "Hello", "--max-tokens", "2", "--json")
    assert json.loads(done.out)["experts"]["slots"] == 32


def test_show_says_which_won(moei: Moei, monkeypatch: pytest.MonkeyPatch) -> None:
    write('context = 256\nprefetch = "off"\n')
    monkeypatch.setenv("MOEI_EXPERTS", "25%")
    done = moei("show", "moei-demo", "--settings", "--policy", "x")
    assert done.code == 2
    done = moei("show", "moei-demo", "--settings", "--ram", "2GiB", "--json")
    assert done.code == 0, done.err
    told = {name: one["reason"] for name, one in json.loads(done.out)["settings"].items()}
    assert told["ram"] == "--ram"
    assert told["experts"] == "MOEI_EXPERTS"
    assert told["context"] == told["prefetch"] == str(config_path())
    assert told["policy"].startswith("automatic: ")


@pytest.mark.parametrize(("option", "value"), [("--ram", "lots"), ("--experts", "120%"), ("--ram", "")])
def test_a_wrong_flag_is_no_setting(moei: Moei, option: str, value: str) -> None:
    done = moei("show", "--settings", option, value)
    assert (done.code, done.out) == (2, "")
    assert option in done.err


def test_without_a_model_the_origins_are_shown(moei: Moei) -> None:
    write('ram = "6GiB"\n')
    done = moei("show", "--settings", "--experts", "40%", "--json")
    told = json.loads(done.out)["settings"]
    assert list(told) == list(SETTINGS)
    assert told["ram"] == {"value": "6GiB", "reason": str(config_path())}
    assert told["experts"] == {"value": "40%", "reason": "--experts"}
    assert told["policy"]["value"] == "automatic"
    assert moei("show", "--settings").out.count("automatic") == len(SETTINGS) - 1
    assert moei("show").code == 2


def test_a_plan_follows_them_too(moei: Moei) -> None:
    write('ram = "nonsense"\n')
    done = moei("plan", "mixtral-8x7b", "--json")
    assert done.code == 2
    assert f"{config_path()}: ram" in done.err


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("moei-demo:q4_0", "moei quantize moei-demo q4_0"),
        ("owner/name:q8_0", "moei pull owner/name --quant q8_0"),
        ("owner/name", "moei pull owner/name"),
        ("owner/name:none", "moei pull owner/name"),
    ],
)
def test_show_says_how_to_get_what_is_not_here(moei: Moei, name: str, way: str) -> None:
    done = moei("show", name)
    assert done.code == 3
    assert done.err.splitlines()[-1].endswith(f"with: {way}")
