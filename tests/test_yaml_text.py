"""YAML that a stranger wrote: every document is plain data or one sentence, in time."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import yaml

from modelsoup import PlanError
from modelsoup.files import yaml_text
from modelsoup.files.yaml_text import dump_yaml, parse_yaml, read_documents, read_yaml

PARSERS = [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)]


@pytest.fixture(params=PARSERS, ids=["python", "libyaml"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: where libyaml is missing, the other reads."""
    monkeypatch.setattr(yaml_text, "_Parser", request.param)


HOSTILE = {
    "a: !!int x": "x:1:4: the tag 'tag:yaml.org,2002:int' is not allowed",
    "a: !!bool abc": "x:1:4: the tag 'tag:yaml.org,2002:bool' is not allowed",
    "!!float": "x:1:1: the tag 'tag:yaml.org,2002:float' is not allowed",
    "a: ! 5": "x:1:4: the tag '!' is not allowed",
    "!!set {a}": "x:1:1: the tag 'tag:yaml.org,2002:set' is not allowed",
    "!!int 1: a": "x:1:1: the tag 'tag:yaml.org,2002:int' is not allowed",
    "a: !!python/object:os.system x": "x:1:4: the tag .* is not allowed",
    "a: "
    + "9" * 5000: r"x:1:4: '9+\.\.\.9+' is an integer of more than 64 bits \(a text stands in q",
    "a: 0x" + "f" * 5000: r"x:1:4: '0xf+\.\.\.f+' is an integer of more than 64 bits",
    "a: -18446744073709551616": "x:1:4: '-18446744073709551616' is an integer of more than 64",
    "a: 1e999": "x:1:4: '1e999' is too large for a number",
    "a: -" + "9" * 400 + ".0": r"x:1:4: '-9+\.\.\.9+\.0' is too large for a number",
    'a: "\\U00110000"': "x",
    'a: "\\UFFFFFFFF"': "x",
    'a: "\\ud800"': "x",
    'a: "\\x07"': r"x:1:4: '\\x07' has control characters",
    "a: \u202eb": "x:1:4: .* has control characters",
    '"a\\nb": 1': r"x:1:1: the key 'a\\nb' has control characters",
    "a: \x00": "x",
    "? [a]\n: b": "x:1:3: a key is no plain text",
    "? {a: 1}\n: b": "x:1:3: a key is no plain text",
    "a: &b c\n*b : d": "x:2:1: a key is no plain text",
    "a: *b": "x:1:4: nothing before this is called &b",
    "&a {a: *a}": r"x:1:8: \*a stands for something that it is part of",
    "a: 1\n---\nb: 1": "x:2:1: a second document begins",
    "a: 1\na: 2": "x:2:1: the key 'a' occurs twice",
    "a: [" * 200: "x:1:204: nested more than 100 deep",
    "- " * 200: "x:1:203: nested more than 100 deep",
    "- &a [[[]]]\n- " + "[" * 98 + "*a" + "]" * 98: "x:2:101: nested more than 100 deep",
    "a: 'b": "x:1:",
    "a:\n\t- b": "x:2:1: found character",
    "%YAML 3.0\n---\na": "x:1:",
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.items(), ids=[t[:20] for t in HOSTILE])
def test_what_is_no_plain_data_is_one_sentence(text: str, said: str, parser: None) -> None:
    with pytest.raises(PlanError, match=f"^{said}") as caught:
        parse_yaml(text, "x")
    assert len(caught.value.args) == 1
    assert len(str(caught.value)) < 300


def test_numbers_that_a_computer_has_are_read(parser: None) -> None:
    text = "[18446744073709551615, -18446744073709551615, 0xffffffffffffffff, 007, 1e308, -0.0]"
    found = parse_yaml(text, "x").content
    assert found == [2**64 - 1, 1 - 2**64, 2**64 - 1, 7, 1e308, 0.0]
    assert math.copysign(1, found[-1]) == -1


def test_an_alias_is_what_it_stands_for_and_stands_where_it_is_written(parser: None) -> None:
    read = parse_yaml("a: &x {k: [1, two]}\nb: *x\nc: [*x, 3]\n", "x")
    once = {"k": [1, "two"]}
    assert read.content == {"a": once, "b": once, "c": [once, 3]}
    assert (read.at("b"), read.at("c", 0), read.at("c", 1)) == ("x:2:1", "x:3:5", "x:3:9")
    assert read.at("c", 0, "k", 1) == "x:1:15"
    assert read.at("c", 7, "k") == "x:3:1"  # the nearest around it
    assert parse_yaml("# nothing\n", "x").content is None
    assert parse_yaml("# nothing\n", "x").at("a") == "x"


@pytest.mark.parametrize("inside", [0, 1, 5])
def test_depth_is_counted_with_aliases_followed(inside: int, parser: None) -> None:
    anchored = "[" * inside + "x" + "]" * inside
    deepest = 99 - inside  # and the list around both
    for more, is_read in ((0, True), (1, False)):
        around = deepest + more
        text = f"- &a {anchored}\n- {'[' * around}*a{']' * around}\n"
        if is_read:
            assert parse_yaml(text, "x").content[0] == parse_yaml(anchored, "x").content
        else:
            with pytest.raises(PlanError, match="nested more than 100 deep"):
                parse_yaml(text, "x")


def test_what_is_written_twice_is_written_out_twice() -> None:
    once = {"a": [1, 2]}
    assert dump_yaml([once, once]) == "- a: [1, 2]\n- a: [1, 2]\n"


SWELLING = {
    "keys": "".join(f"k{n}: 1\n" for n in range(250_000)),
    "flow keys": "{" + ",".join(f"k{n}: 1" for n in range(250_000)) + "}",
    "a flat list": "[" + "1," * 5_000_000 + "1]",
    "lists": "[" * 5_000_000,
    "block lists": "- " * 5_000_000,
    "mappings": "{a: " * 2_000_000,
    "aliases of a long text": f"- &a {'x' * 5_000_000}\n" + "- *a\n" * 190_000,
    "aliases of aliases": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    ),
    "documents": "---\n" * 2_500_000,
    "anchors": "".join(f"- &a{n} x\n" for n in range(250_000)),
}


@pytest.mark.parametrize("text", SWELLING.values(), ids=SWELLING)
def test_limits_count_while_a_text_is_read(text: str) -> None:
    start = time.process_time()
    with pytest.raises(PlanError, match=r"more than|second document|nesting depth"):
        parse_yaml(text, "x")
    assert time.process_time() - start < 12  # 2 s on a machine that does nothing else


def test_a_large_text_within_the_limits_is_read_in_time() -> None:
    text = "".join(f"k{n}: [a, 1]\n" for n in range(65_000)) + f"long: '{'x y ' * 1_000_000}'\n"
    start = time.process_time()
    assert len(parse_yaml(text, "x").content) == 65_001
    assert time.process_time() - start < 12


def test_only_a_regular_file_of_some_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_bytes(b" " * 10_000_001)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    for name, said in {
        "pipe.yaml": "cannot read .*pipe.yaml: it is not a regular file",
        ".": "cannot read .*: it is not a regular file",
        "large.yaml": "cannot read .*: it has more than 10,000,000 bytes",
        "latin.yaml": "latin.yaml is not UTF-8: byte 3",
        "larg.yaml": "larg.yaml does not exist; did you mean 'large.yaml'",
        "x" * 300: "cannot read .*: File name too long",
    }.items():
        with pytest.raises(PlanError, match=said):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("name", ["a\u202eb", "a\x9bb", "a\u00a0b", "a\u200fb", "a\ufeffb"])
def test_what_would_drive_a_terminal_is_written_escaped(name: str):
    content = {"names": [name, "ä", "模型"]}
    text = dump_yaml(content)
    assert all(line.isprintable() for line in text.split("\n"))
    assert yaml.safe_load(text) == content


def test_what_is_printable_is_written_as_it_is():
    assert "ä: 模型" in dump_yaml({"ä": "模型"})


def test_several_documents_are_read_where_they_may_be_there(tmp_path: Path):
    (tmp_path / "x").write_text("a: &b 1\n---\nc:\n  d: 2\n---\n")
    found = read_documents(tmp_path / "x")
    assert [text.content for text in found] == [{"a": 1}, {"c": {"d": 2}}, None]
    assert found[1].at("c", "d") == f"{tmp_path / 'x'}:4:3"
    (tmp_path / "x").write_text("a: &b 1\n---\nc: *b\n")
    with pytest.raises(PlanError, match="x:3:4: nothing before this is called &b"):
        read_documents(tmp_path / "x")
