"""Damaged and hostile headers: the same verdict as the reference library's, and never a traceback.

What modelsoup accepts, the reference library accepts, and finds the same in it. What the reference
library accepts, modelsoup accepts too, but for the few things that it refuses on purpose
(`on_purpose`). `MODELSOUP_FUZZ_SECONDS` says how long this file looks for a difference: 60 s by
default, half of it with headers whose parts are changed one by one.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelsoup import CheckpointError, open_checkpoint
from modelsoup.files.dtypes import DTYPES
from modelsoup.files.header import MAX_HEADER, _must_be_flat

SECONDS = float(os.environ.get("MODELSOUP_FUZZ_SECONDS", "60"))
ROUND = settings(
    max_examples=200, deadline=None, database=None, derandomize=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
pytestmark = pytest.mark.timeout(2 * SECONDS + 300)

KEYS = ("dtype", "shape", "data_offsets")


class Pairs(list[tuple[Any, Any]]):
    """A JSON object in any order, in which a name may occur twice."""


class Raw(str):
    """A piece of text that goes into the header as it is."""

    __slots__ = ()


# The comparison


def twice(header: bytes) -> bool:
    """Whether any object in the header has a name twice."""
    found = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len({key for key, _ in pairs}) < len(pairs))
        return dict(pairs)

    json.loads(header, object_pairs_hook=note)
    return any(found)


def on_purpose(header: bytes, sentence: str) -> str | None:
    """Why modelsoup refuses what the reference library accepts, told from both header and error."""
    entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}.values()
    if twice(header) and re.search(r": the header has the name .* twice$", sentence, re.DOTALL):
        return "a name twice"
    told = re.search(r": tensor .* has (.*) where \[.*\] were expected$", sentence, re.DOTALL)
    if told and told[1] == "list" and any(isinstance(entry, list) for entry in entries):
        return "a tensor written as an array"
    objects = [entry for entry in entries if isinstance(entry, dict)]
    if told and any(told[1] == str(sorted(e)) and e.keys() > set(KEYS) for e in objects):
        return "an unknown key"
    if re.search(r": tensor .* has the unknown dtype [^']", sentence, re.DOTALL) and any(
        isinstance(entry["dtype"], dict) for entry in objects
    ):
        return "a dtype written as an object"
    return None


def verdict(content: bytes, file: Path) -> str:
    """Compare both libraries on one file, and say what came of it."""
    try:
        reference = {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        reference = None
    file.write_bytes(content)
    started = time.process_time()
    try:
        checkpoint = open_checkpoint(file)
    except CheckpointError as error:
        assert time.process_time() - started < 1, "slow"
        sentence = str(error)
        assert sentence.startswith((f"{file}: ", f"{file} is ")), sentence
        if reference is None:
            return "refused"
        length = int.from_bytes(content[:8], "little")
        reason = on_purpose(content[8 : 8 + length], sentence)
        assert reason, f"the reference library accepts {content!r}, but: {sentence}"
        return reason
    assert time.process_time() - started < 1, "slow"
    assert reference is not None, f"the reference library refuses {content!r}"
    _must_be_flat(content[8 : 8 + int.from_bytes(content[:8], "little")])  # as of a large header
    found = {
        name: (info.dtype, info.shape, content[info.start : info.stop])
        for name, info in checkpoint.tensors.items()
    }
    assert found == reference, content
    with safetensors.safe_open(file, "numpy") as opened:
        assert (opened.metadata() or {}) == checkpoint.metadata, content
    for name, (dtype, shape, data) in reference.items():
        if DTYPES[dtype].numpy:
            try:
                array = checkpoint[name]
            except CheckpointError:  # no array can have that shape
                size = math.prod(filter(None, shape)) * DTYPES[dtype].bits // 8
                assert size >= 2**63 or len(shape) > 32, content
            else:
                assert (array.shape, array.tobytes()) == (shape, data), content
    return "accepted"


def compare_for(seconds: float, file: Path, make: Callable[[random.Random], bytes]) -> Counter[str]:
    """Make cases for so long, and count the verdicts.

    Half of the time they are hypothesis's, which shows the smallest case that fails; the other half
    they are drawn from plain random numbers, which gives ten times as many.
    """
    seen: Counter[str] = Counter()

    @ROUND
    @given(rng=st.randoms(use_true_random=False))
    def a_round(rng: random.Random) -> None:
        seen[verdict(make(rng), file)] += 1

    started = time.monotonic()
    while not seen or time.monotonic() < started + seconds / 2:
        a_round()
    by_hypothesis = seen.total()
    rng = random.Random()
    while time.monotonic() < started + seconds:
        seen[verdict(make(rng), file)] += 1
    print(f"\n{seen.total()} cases, {by_hypothesis} of them by hypothesis: {dict(seen)}")
    return seen


# The headers


def spell(node: Any, rng: random.Random) -> str:
    """JSON text, in one of the ways in which the same value can be written."""
    match node:
        case Raw():
            return str(node)
        case Pairs():
            pairs = [f"{spell(key, rng)}:{spell(value, rng)}" for key, value in node]
            return "{" + ",".join(pairs) + "}"
        case list():
            return "[" + ",".join(spell(item, rng) for item in node) + "]"
        case str():
            return json.dumps(node, ensure_ascii=rng.random() < 0.5)
    return json.dumps(node)


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


NAMES = ["a", "b", "c", "a.weight", "", "ключ", "🍲", "a\x7f", "\\", '"', "\n\b\x1f", "\u2028"]
NUMBERS = [*range(10), 2**31, 2**32, 2**53 + 1, 2**59, 2**60, 2**61, 2**62, 2**63 - 1, 2**63,
           2**64 - 1]  # fmt: skip
ODD_NUMBERS = [-1, 2**64, 2**64 + 1, 10**19, 10**20, 10**400, True, False, None, "1", 1.5] + [
    Raw(text)
    for text in (
        "1.0", "1e2", "-0", "0.0", "-1.0", "01", "+1", "1e999", "NaN", "Infinity", "0x1", "1_0",
        "١", "--1", ".5", "1.", "1e", "", "[]", "{}", "[1]", "nul",
    )
]  # fmt: skip
DEEP = [
    *(Raw("[" * depth + "]" * depth) for depth in (3, 120, 127, 128, 129, 900, 2_000)),
    *(Raw('{"k":[' * depth + "]}" * depth) for depth in (3, 60, 64, 65, 500, 1_000)),
    Raw("[" * 300),
    Raw('{"k":' * 300),
]
ESCAPES = [
    Raw(f'"{text}"')
    for text in (
        r"\u0061", r"\ud800", r"\udc00x", r"\ud83c\udf72", r"\u0000", r"\x", r"\/", r"\b\f", "\t",
        "\x00", r"\u00", r"\uD83C\u0061", r"\u+061", r"\udf72\ud83c", "\ud800",
    )
]  # fmt: skip
ODD_DTYPES = ["f32", "F33", "", "F32 ", "F8", 0, None, ["F32"], 17]


def a_text(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(ESCAPES)
    if kind == 1:
        return "".join(chr(rng.choice([rng.randrange(0x80), rng.randrange(0xD800)])) for _ in "12")
    return rng.choice([*NAMES, "__metadata__"])


def a_number(rng: random.Random) -> Any:
    return rng.choice(ODD_NUMBERS) if rng.random() < 0.3 else rng.choice(NUMBERS)


def numbers(rng: random.Random, most: int, a_number: Callable[[random.Random], Any]) -> list[Any]:
    return [a_number(rng) for _ in range(rng.randrange(most + 1))]


def a_shape(rng: random.Random) -> list[Any]:
    return numbers(rng, 3, rng.choice([a_number, lambda rng: rng.choice(NUMBERS)]))


def anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 6)
    match kind:
        case 0:
            return rng.choice([None, True, False, 0.5])
        case 1 | 2:
            return a_number(rng)
        case 3 | 4:
            return a_text(rng)
        case 5:
            return rng.choice(DEEP)
        case 6:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return Pairs([(a_text(rng), anything(rng, depth + 1)) for _ in range(rng.randrange(4))])


def shuffled(items: list[Any], rng: random.Random) -> list[Any]:
    return rng.sample(items, len(items))


def entry(dtype: str, shape: list[int], start: int, rng: random.Random) -> Pairs:
    stop = start + math.prod(shape) * DTYPES[dtype].bits // 8
    made = [("dtype", dtype), ("shape", shape), ("data_offsets", [start, stop])]
    return Pairs(shuffled(made, rng))


def sound_header(rng: random.Random) -> tuple[Pairs, int]:
    """A header that is right, and how many bytes of data belong to it."""
    header: list[tuple[Any, Any]] = []
    end = 0
    for name in rng.sample(NAMES, rng.randrange(5)):
        shape = shuffled([4, *numbers(rng, 2, lambda rng: rng.randrange(4))], rng)
        made = entry(rng.choice(list(DTYPES)), shape, end, rng)
        end = dict(made)["data_offsets"][1]
        header.append((name, made))
    if rng.random() < 0.5:
        texts = [rng.choice(NAMES) for _ in range(rng.randrange(3))]
        header.append(("__metadata__", Pairs((text, text) for text in dict.fromkeys(texts))))
    return Pairs(shuffled(header, rng)), end


def changed_entry(made: Pairs, rng: random.Random) -> Any:
    """One tensor's entry, with one thing about it changed."""
    values = dict(made)
    dtype, shape, (start, stop) = (values[key] for key in KEYS)

    def put(key: str, value: Any) -> Pairs:
        return Pairs([(k, value if k == key else v) for k, v in made])

    match rng.randrange(18):
        case 0:
            return put("dtype", rng.choice(list(DTYPES)))
        case 1:
            return put("dtype", rng.choice(ODD_DTYPES))
        case 2:
            value = rng.choice([None, [], "", 0])
            return put("dtype", Pairs([(rng.choice([dtype, "F32", "x"]), value)]))
        case 3:
            return put("shape", a_shape(rng))
        case 4:  # the same number of elements, or none: sound as long as nothing overflows
            extra = rng.choices([1, *NUMBERS, 2**64, 2**70], k=rng.randrange(3))
            return put("shape", shuffled([*shape, *extra], rng))
        case 5:
            return put("shape", [1] * rng.randrange(70) + shape)
        case 6:
            return put("data_offsets", [start + rng.randint(-2, 2), stop + rng.randint(-2, 2)])
        case 7:
            return put("data_offsets", a_shape(rng))
        case 8:
            return put("data_offsets", [stop, start])
        case 9:  # another dtype of the same size: sound
            same = [name for name, d in DTYPES.items() if d.bits == DTYPES[dtype].bits]
            return put("dtype", rng.choice(same))
        case 10:
            return Pairs([*made, (a_text(rng), anything(rng))])
        case 11:
            return Pairs(made[: rng.randrange(3)])
        case 12:
            return Pairs([*made, rng.choice(made)])
        case 13:
            return rng.choice([[dtype, shape, [start, stop]], [dtype, shape], [dtype]])
        case 14:
            return [list(pair) for pair in made]
        case 15 | 16:  # a number of the same value, written in another way
            key = rng.choice(["shape", "data_offsets"])
            value = [*values[key]]
            place = rng.randrange(len(value))
            n = value[place]
            ways = [Raw(f"{n}.0"), Raw(f"{n}e0"), Raw(f"-{n}"), Raw(f"0{n}"), str(n), [n]]
            value[place] = rng.choice([*ways, bool(n)] if n in (0, 1) else ways)
            return put(key, value)
    return anything(rng)


def is_sound(item: tuple[Any, Any]) -> bool:
    """Whether an entry is still as `changed_entry` expects it."""
    values = dict(item[1]) if isinstance(item[1], Pairs) else {}
    offsets = values.get("data_offsets")
    return (
        values.keys() == set(KEYS)
        and values["dtype"] in list(DTYPES)
        and isinstance(values["shape"], list)
        and len(values["shape"]) > 0
        and isinstance(offsets, list)
        and [type(offset) for offset in offsets] == [int, int]
    )


def changed_header(rng: random.Random) -> tuple[str, int]:
    """The text of a header of which some things were changed, and the size of its data."""
    header, end = sound_header(rng)
    for _ in range(rng.randrange(4)):
        tensors = [place for place, item in enumerate(header) if is_sound(item)]
        what = rng.randrange(10)
        if what <= 3 and tensors:
            place = rng.choice(tensors)
            header[place] = (header[place][0], changed_entry(header[place][1], rng))
        elif what == 4:  # a tensor without bytes, which may lie between any two others
            shape = shuffled([0, *numbers(rng, 2, lambda rng: rng.choice([*NUMBERS, 2**64]))], rng)
            stops = [dict(header[place][1])["data_offsets"][1] for place in tensors]
            start = rng.choice([0, 1, end, *stops])
            header.append((a_text(rng), entry(rng.choice(list(DTYPES)), shape, start, rng)))
        elif what == 5 and header:
            header.pop(rng.randrange(len(header)))
        elif what == 6 and header:
            header.append(rng.choice(header))
        elif what == 7 and header:
            place = rng.randrange(len(header))
            header[place] = (a_text(rng), header[place][1])
        elif what == 8:
            header.append((a_text(rng), anything(rng)))
        elif what == 9:
            texts = Pairs((a_text(rng), a_text(rng)) for _ in range(rng.randrange(4)))
            header.append(("__metadata__", rng.choice([texts, texts, None, anything(rng)])))
    return spell(header, rng), end


def changed_file(rng: random.Random) -> bytes:
    text, end = changed_header(rng)
    before, after = (rng.choice(["", "", " ", "       ", "\n", "\t\r"]) for _ in "12")
    return packed(encoded(before + text + after), rng.randbytes(end))


def broken_file(rng: random.Random) -> bytes:
    """A file whose bytes were changed, whatever they mean."""
    made, end = sound_header(rng)
    text = spell(made, rng)
    if rng.random() < 0.3:
        text, end = changed_header(rng)
    header = bytearray(encoded(text))
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at, other = rng.randint(0, len(header)), rng.randint(0, len(header))
        known = [b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"\0", b"\\u0061", b"\xff"]
        character = bytes([rng.choice(b'{}[]",:0123456789 \\ntrue-.eE')])
        piece = rng.choice([rng.randbytes(rng.randint(1, 4)), character, rng.choice(known)])
        match rng.randrange(6):
            case 0:
                header[at : at + len(piece)] = piece
            case 1:
                header[at:at] = piece
            case 2:
                del header[at : at + rng.randint(1, 8)]
            case 3 if at < len(header):
                header[at] ^= 1 << rng.randrange(8)
            case 4:
                del header[at:]
            case 5:
                header[at:at] = header[min(at, other) : max(at, other)]
    length = right = len(header)
    if rng.random() < 0.25:
        near = [right - 8, right - 1, right + 1, right + 8, right + end, right + end + 1, 0, 1]
        far = [MAX_HEADER, MAX_HEADER + 1, 2**31, 2**32 + right, 2**63, 2**64 - 1, 2**64 - 8]
        length = max(0, rng.choice(near + far))
    size = end if rng.random() < 0.7 else max(0, end + rng.choice([-1, 1, -8, 8]))
    whole = packed(bytes(header), rng.randbytes(size), length)
    return whole if rng.random() < 0.7 else whole[: rng.randint(0, len(whole))]


def random_file(rng: random.Random) -> bytes:
    data = rng.randbytes(rng.randrange(9))
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.randrange(64))
        case 1:
            return packed(rng.randbytes(rng.randrange(64)), data)
        case 2:
            return packed(bytes(rng.randrange(128) for _ in range(rng.randrange(30))), data)
        case 3:
            return packed(encoded(spell(anything(rng), rng)), data)
    pairs = Pairs([("__metadata__", anything(rng)), (a_text(rng), anything(rng))])
    return packed(encoded(spell(Pairs(pairs[: rng.randint(0, 2)]), rng)), data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fuzz.safetensors"


def test_headers_whose_parts_were_changed_get_the_reference_librarys_verdict(file: Path) -> None:
    seen = compare_for(SECONDS / 2, file, changed_file)
    assert seen["accepted"] > 0.05 * seen.total(), "most cases must get far into the checks"
    assert seen["refused"] > 0.05 * seen.total()


def test_files_whose_bytes_were_changed_get_the_reference_librarys_verdict(file: Path) -> None:
    seen = compare_for(SECONDS / 3, file, broken_file)
    assert min(seen["accepted"], seen["refused"]) > 0.01 * seen.total()


def test_random_bytes_and_random_json_get_the_reference_librarys_verdict(file: Path) -> None:
    seen = compare_for(SECONDS / 6, file, random_file)
    assert seen["refused"] > 0.5 * seen.total()


def sound(text: str, data: bytes = b"1234") -> bytes:
    return packed(text.encode(), data)


ONE = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
KNOWN: dict[str, Callable[[], tuple[bytes, str]]] = {
    "sound": lambda: (sound(f'{{"a":{{{ONE}}}}}'), "accepted"),
    "nothing": lambda: (packed(b"{}", b""), "accepted"),
    "whitespace": lambda: (sound(f' \n\t\r{{ "a" : {{{ONE}}} }}\n  '), "accepted"),
    "metadata null": lambda: (sound(f'{{"__metadata__":null,"a":{{{ONE}}}}}'), "accepted"),
    "the same tensor twice": lambda: (sound(f'{{"a":{{{ONE}}},"a":{{{ONE}}}}}'), "a name twice"),
    "the same name by an escape": lambda: (
        sound(rf'{{"a":{{{ONE}}},"\u0061":{{{ONE}}}}}'),
        "a name twice",
    ),
    "the same metadata twice": lambda: (
        packed(b'{"__metadata__":{"k":"1","k":"2"}}', b""),
        "a name twice",
    ),
    "a tensor as an array": lambda: (
        sound('{"a":["F32",[1],[0,4]]}'),
        "a tensor written as an array",
    ),
    "a tensor as an array of pairs": lambda: (
        sound('{"a":[["dtype","F32"],["shape",[1]],["data_offsets",[0,4]]]}'),
        "refused",
    ),
    "an unknown key": lambda: (sound(f'{{"a":{{{ONE},"order":"C"}}}}'), "an unknown key"),
    "an unknown key with a negative number": lambda: (
        sound(f'{{"a":{{{ONE},"axis":-1}}}}'),
        "an unknown key",
    ),
    "a dtype as an object": lambda: (
        sound(f'{{"a":{{{ONE}}}}}'.replace('"F32"', '{"F32":null}')),
        "a dtype written as an object",
    ),
    "an empty tensor, huge first": lambda: (
        sound('{"a":{"dtype":"F32","shape":[4611686018427387904,0],"data_offsets":[0,0]}}', b""),
        "accepted",
    ),
    "an empty tensor, huge last": lambda: (
        sound('{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}', b""),
        "accepted",
    ),
    "an empty tensor, overflow first": lambda: (
        sound('{"a":{"dtype":"F32","shape":[9223372036854775808,2,0],"data_offsets":[0,0]}}', b""),
        "refused",
    ),
    "an empty tensor, a size of 2^64": lambda: (
        sound('{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', b""),
        "refused",
    ),
    "true for 1": lambda: (sound(f'{{"a":{{{ONE}}}}}'.replace("[1]", "[true]")), "refused"),
    "false for 0": lambda: (sound(f'{{"a":{{{ONE}}}}}'.replace("[0,", "[false,")), "refused"),
    "a minus zero": lambda: (
        sound('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
        "refused",
    ),
    "seventy dimensions": lambda: (
        sound(f'{{"a":{{{ONE}}}}}'.replace("[1]", str([1] * 70))),
        "accepted",
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_cases_that_once_told_the_libraries_apart(file: Path, case: str) -> None:
    content, expected = KNOWN[case]()
    assert verdict(content, file) == expected
