"""What errors say: one line a sentence, whatever files are called, and hints that can be pasted."""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import modelsoup
from modelsoup import SoupError
from modelsoup.errors import layer_option, option, parameter_option, speaking
from modelsoup.files.reading import open_regular, read_small
from modelsoup.terminal.cli import main

RULES = [("it's [x]", "first"), ("b.*", "drop")]


def test_what_files_say_can_neither_forge_a_line_nor_drive_the_terminal():
    error = SoupError("a\ninput y: unchanged", "b\x9b2J\x07\u202e\r\0\udc80é日")
    lines = ["a\\ninput y: unchanged", "b\\x9b2J\\x07\\u202e\\r\\x00\\udc80é日"]
    assert str(error).split("\n") == lines
    assert list(pickle.loads(pickle.dumps(error)).args) == lines


def test_a_hint_for_the_command_line_can_be_pasted():
    with speaking("command"):
        assert option("force") == "--force"
        assert option("on_integer", "first") == "--on-integer first"
        assert parameter_option("t", "0.4") == "--set t=0.4"
        words = shlex.split(layer_option(RULES))
    assert words == ["--layers", "it's [x]=first", "--layers", "b.*=drop"]


def test_a_hint_for_a_plan_is_yaml():
    with speaking("plan"):
        assert yaml.safe_load(layer_option(RULES)) == {"layers": dict(RULES)}
        assert yaml.safe_load(option("on_integer", "first")) == {"on_integer": "first"}
        assert yaml.safe_load(parameter_option("normalize", "false")) == {"normalize": False}


def test_a_hint_for_python_is_python():
    assert option("force") == "force=True"
    assert option("on_integer", "first") == "on_integer='first'"
    with speaking("plan"):
        assert yaml.safe_load(layer_option([("*a", "slerp;t:0.4")], "merge")) == {
            "layers": {"*a": ["slerp", "t:0.4"], "rest": "merge"}
        }
    with speaking("command"):
        assert layer_option([("*a", "merge")], "merge") == "--layers '*a=merge' --rest merge"
    assert layer_option([("*a", "merge")], "drop") == "layers=['*a=merge'], rest='drop'"
    assert layer_option(RULES) == "layers=[\"it's [x]=first\", 'b.*=drop']"


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(OSError, match="not a regular file"):
            os.close(open_regular(tmp_path / name))


def test_no_more_of_a_file_is_read_than_wanted(tmp_path: Path):
    (tmp_path / "small").write_bytes(b"1234")
    assert read_small(tmp_path / "small", 4) == b"1234"
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_small(tmp_path / "small", 3)


def commands(group: click.Group) -> Iterator[click.Command]:
    """All commands, those that the adapters offer too."""
    with click.Context(group) as context:
        found = [group.get_command(context, name) for name in group.list_commands(context)]
    for command in found:
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command)
        else:
            yield command


def test_no_command_takes_an_empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    offered = [point.load() for point in metadata.entry_points(group="modelsoup.commands")]
    every = [*commands(main), *(command for group in offered for command in commands(group))]
    paths = [
        (command, param) for command in every for param in command.params
        if isinstance(param.type, click.Path)
    ]  # fmt: skip
    assert len(paths) > 30
    for command, param in paths:
        name = max(param.opts, key=len)
        said = name if isinstance(param, click.Option) else param.human_readable_name
        words = []
        for other in command.params:
            value = "" if other is param else "x"
            if not isinstance(other, click.Option):
                words += [value] if other is param or other.required else []
            elif other is param:
                words += [name, value]
        result = CliRunner().invoke(command, words)
        assert isinstance(result.exception, SoupError), (command.name, name, result.output)
        assert str(result.exception) == f"the path of {said} is empty"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["plan", "tree.yaml", "--svg", ""], "--svg"),
        (["run", "tree.yaml", "--store", ""], "--store"),
        (["run", "tree.yaml", "-o", ""], "--output"),
        (["plan", "--from", ""], "--from"),
        (["plan", ""], "TREE.yaml"),
        (["store", "list", "--store", ""], "--store"),
        (["verify", "o.safetensors", "--inputs", ""], "--inputs"),
        (["merge", "a.safetensors", "", "-o", "o.safetensors"], "A B [C …]"),
    ],
)
def test_an_empty_path_is_told_in_a_sentence(words, name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.stderr) == (1, f"Error: the path of {name} is empty\n")
    assert not list(tmp_path.iterdir())


def test_whoever_lacks_an_extra_is_not_sent_to_an_index_that_has_no_modelsoup() -> None:
    assert modelsoup.how_to_install("i2i") == "pip install -e '.[i2i]' in a clone of modelsoup"
    root = Path(modelsoup.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "adapters").rglob("*.py")]
    assert len(files) > 60
    sent = [file.name for file in files if "install 'modelsoup[" in file.read_text("utf-8")]
    assert sent == []
