"""What errors say: one line a sentence, whatever files are called, and hints that can be pasted."""

from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path

import pytest
import yaml

from modelsoup import SoupError
from modelsoup.errors import layer_option, option, parameter_option, speaking
from modelsoup.reading import open_regular, read_small

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
