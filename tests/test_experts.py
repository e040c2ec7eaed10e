"""Several experts in one file: what it holds, and that each comes out of it as a merge makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import modelsoup
from modelsoup.errors import SoupError
from modelsoup.merging.experts import KEY
from modelsoup.merging.forms import BLOCK
from modelsoup.terminal.cli import main

# More than a block, blocks and bytes that are not full, one element, none.
SHAPES = {
    "layers.0.weight": (37, 19), "layers.0.bias": (5,), "layers.1.weight": (300, 301),
    "kernel": (4, 3, 3, 3), "large": (5 * BLOCK + 3,), "scalar": (), "empty": (0, 4),
}  # fmt: skip
NAMES = ("cars", "digits", "signs")
State = dict[str, np.ndarray]


def states(seed: int = 0) -> list[State]:
    """A base and three models about it."""
    generator = np.random.default_rng(seed)
    base = {n: np.asarray(generator.normal(size=s), np.float32) for n, s in SHAPES.items()}
    return [base] + [
        {n: np.asarray(v + 0.1 * generator.normal(size=v.shape), np.float32)
         for n, v in base.items()} for _ in NAMES
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and three models that were tuned from it."""
    monkeypatch.chdir(tmp_path)
    for name, state in zip(("base", *NAMES), states(), strict=True):
        save_file(state, f"{name}.safetensors")
    return tmp_path


MODELS = [f"{name}.safetensors" for name in NAMES]
BASE, PACKED, OUT = "base.safetensors", "experts.safetensors", "out.safetensors"


def soup(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pack(**options: Any) -> modelsoup.PackReport:
    given = {"base": BASE, "fsync": False, "force": True, **options}
    return modelsoup.pack_experts(given.pop("models", MODELS), PACKED, **given)


def got(expert: int | str, **options: Any) -> State:
    given = {"base": BASE, "fsync": False, "force": True, **options}
    modelsoup.get_expert(PACKED, OUT, expert=expert, **given)
    return load_file(OUT)


def merged(expert: int, method: str, parameters: dict[str, Any], **options: Any) -> State:
    modelsoup.merge(
        MODELS, "merged.safetensors", base=BASE, method=method, force=True, fsync=False,
        parameters={**parameters, "expert": expert}, **options,
    )  # fmt: skip
    return load_file("merged.safetensors")


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes(), name


CASES = [
    ("emr", {}), ("emr", {"lambda": 0.7}), ("consensus", {}),
    ("consensus", {"threshold": [0.2, 0.4, 0.9], "lambda": 1.1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_an_expert_comes_out_of_the_file_as_a_merge_would_make_it(
    method: str, parameters: dict[str, Any]
) -> None:
    pack(method=method, parameters=parameters)
    for number, name in enumerate(NAMES, 1):
        wanted = merged(number, method, parameters)
        assert_same(got(number), wanted)
        assert_same(got(name), wanted)
        assert_same(got(str(number), workers=1), wanted)


def test_sixteen_bit_models_come_out_exactly_where_what_they_share_is_stored_wide() -> None:
    for name, state in zip(("base", *NAMES), states(), strict=True):
        halved = {n: v.astype(ml_dtypes.bfloat16) for n, v in state.items()}
        save_file(halved, f"{name}.safetensors")
    pack(dtype="f32")
    assert_same(got(2), merged(2, "emr", {}))
    narrow = pack()
    assert modelsoup.open_checkpoint(PACKED).tensors["shared.large"].dtype == "BF16"
    assert narrow.bytes_written < pack(dtype="f32").bytes_written
    pack()
    base, wanted, found = load_file(BASE), merged(2, "emr", {}, dtype="f32"), got(2, dtype="f32")
    for name in SHAPES:
        own = base[name].astype(np.float32)
        task = np.abs(wanted[name] - own).max(initial=0)
        assert np.abs(found[name] - wanted[name]).max(initial=0) <= task * 2**-8


def test_what_is_shared_by_codes_of_eight_bits_is_wider_than_they_are() -> None:
    for name, state in zip(("base", *NAMES), states(), strict=True):
        eight = {n: v.astype(ml_dtypes.float8_e4m3fn) for n, v in state.items()}
        save_file(eight, f"{name}.safetensors")
    pack()
    assert modelsoup.open_checkpoint(PACKED).tensors["shared.large"].dtype == "BF16"
    modelsoup.get_expert(PACKED, OUT, base=BASE, expert=1)
    found, first = modelsoup.open_checkpoint(OUT), modelsoup.open_checkpoint(MODELS[0])
    assert found["large"].dtype == ml_dtypes.float8_e4m3fn
    apart = np.abs(found["large"].astype(np.float32) - first["large"].astype(np.float32))
    assert apart.mean() < 0.1  # an eighth, which its codes may be off, of values of about one


def test_the_file_holds_one_model_and_a_bit_of_each_parameter_for_each_expert() -> None:
    report = pack()
    parameters = sum(int(np.prod(shape)) for shape in SHAPES.values())
    bits = 3 * sum(-(-int(np.prod(shape)) // 8) for shape in SHAPES.values())
    assert (report.parameters, report.tensors) == (parameters, len(SHAPES))
    assert report.bytes_written == 4 * parameters + bits
    assert report.bytes_of_models == 3 * 4 * parameters
    assert Path(PACKED).stat().st_size < report.bytes_written + 4000
    assert report.experts == NAMES
    opened = modelsoup.open_checkpoint(PACKED)
    told = json.loads(opened.metadata[KEY])
    assert (told["method"], told["experts"], len(told["scales"])) == ("emr", list(NAMES), 3)
    base, first, *_ = states()
    unified = opened["shared.layers.0.bias"]
    mask = np.unpackbits(opened["masks.layers.0.bias"][0])[:5]
    task = first["layers.0.bias"] - base["layers.0.bias"]
    assert mask.tolist() == (task * unified > 0).astype(int).tolist()


def test_experts_come_back_as_folders_with_the_bases_config(here: Path) -> None:
    folder = here / "base"
    folder.mkdir()
    Path(BASE).rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["Net"]}')
    pack(base=folder)
    modelsoup.get_expert(PACKED, "out", base=folder, expert=3, shard_size="200KB", fsync=False)
    assert json.loads((here / "out" / "config.json").read_text()) == {"architectures": ["Net"]}
    opened = modelsoup.open_checkpoint("out")
    assert len(opened.files) > 2
    modelsoup.merge(
        MODELS, "merged.safetensors", base=folder, method="emr", parameters={"expert": 3}
    )
    assert_same(dict(opened), load_file("merged.safetensors"))


def test_what_is_no_float_is_the_bases() -> None:
    for number, (name, state) in enumerate(zip(("base", *NAMES), states(), strict=True)):
        save_file({**state, "steps": np.array([number])}, f"{name}.safetensors")
    (note,) = pack().notices
    assert note.level == "note"
    assert note.message == "1 tensor is no floats, and an expert has the base's: steps"
    assert got(3)["steps"].tolist() == [0]


def test_where_an_expert_is_from_can_be_read_and_verified() -> None:
    pack()
    got("digits")
    made = modelsoup.read_lineage(OUT)
    assert made is not None
    assert (made["experts"], made["method"]) == (2, "task_arithmetic")
    assert [entry["name"] for entry in made["inputs"]] == [PACKED]
    assert made["base"]["name"] == BASE
    (packing,) = made["ancestors"].values()
    assert (packing["experts"], packing["method"]) == ("packed", "emr")
    assert [entry["name"] for entry in packing["inputs"]] == MODELS
    assert modelsoup.verify(OUT).sound
    printed = soup("inspect", OUT, "--lineage").stdout
    assert "task_arithmetic, experts 2" in printed
    assert "emr, experts packed" in printed
    refused = soup("plan", "--from", OUT)
    assert refused.exit_code == 1
    assert "was made with packed experts, which no plan can say yet" in refused.stderr


def test_by_commands() -> None:
    done = soup(
        "experts", "pack", *MODELS, "--base", BASE, "-o", PACKED, "--method", "consensus",
        "--set", "threshold=0.4,0.5,0.6", "--no-fsync",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["  1  cars", "  2  digits", "  3  signs"]
    done = soup("experts", "get", PACKED, "--base", BASE, "--expert", "signs", "-o", OUT, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["output"] == OUT
    assert_same(load_file(OUT), merged(3, "consensus", {"threshold": [0.4, 0.5, 0.6]}))
    again = soup("experts", "pack", *MODELS, "--base", BASE, "-o", PACKED)
    assert again.exit_code == 1
    assert "exists" in again.stderr
    told = json.loads(
        soup("experts", "pack", *MODELS, "--base", BASE, "-o", PACKED, "--force", "--json").stdout
    )
    assert told["experts"] == list(NAMES)


# Bad input.


@pytest.mark.parametrize(
    ("expert", "said"),
    [
        ("digit", "has no expert 'digit'; did you mean 'digits'? (it has 1 cars, 2 digits, 3 sig"),
        (0, "has no expert 0 (it has 1 cars, 2 digits, 3 signs)"),
        (4, "has no expert 4"),
        ("-1", "has no expert '-1'"),
        ("²", "has no expert '²'"),
    ],
)
def test_an_expert_that_is_not_there_is_named_with_those_that_are(
    expert: int | str, said: str
) -> None:
    pack()
    with pytest.raises(SoupError) as error:
        got(expert)
    assert said in str(error.value)
    assert not Path(OUT).exists()


def test_two_experts_of_one_name_go_by_their_numbers(here: Path) -> None:
    models = []
    for number, path in enumerate(MODELS[:2]):
        (here / str(number)).mkdir()
        models.append((here / path).rename(here / str(number) / "model.safetensors"))
    pack(models=models)
    with pytest.raises(SoupError, match="the expert 'model' may be 1 or 2: say its number"):
        got("model")
    assert got(2).keys() == SHAPES.keys()


def test_an_expert_over_another_base_is_refused_with_the_tensors_that_differ() -> None:
    pack()
    base = load_file(BASE)
    base["large"][-1] += 1e-3
    save_file(base, "moved.safetensors")
    with pytest.raises(SoupError) as error:
        got(1, base="moved.safetensors")
    assert str(error.value) == (
        "experts.safetensors was packed over another base than moved.safetensors: 1 tensor of 7 "
        "differ, large"
    )
    del base["scalar"]
    save_file(base, "less.safetensors")
    with pytest.raises(SoupError, match=r"over another base than less\.safetensors: .* scalar"):
        got(1, base="less.safetensors")
    assert not Path(OUT).exists()


def test_what_is_no_file_of_experts_is_refused() -> None:
    pack()
    with pytest.raises(SoupError, match=r"cars\.safetensors holds no experts: soup experts pack"):
        modelsoup.get_expert("cars.safetensors", OUT, base=BASE, expert=1)
    opened = modelsoup.open_checkpoint(PACKED)
    told, tensors = json.loads(opened.metadata[KEY]), load_file(PACKED)
    for broken in (
        "[]", "{", "null", json.dumps({**told, "scales": [1.0]}), "[" * 100_000,
        json.dumps({**told, "format": 2}), json.dumps({**told, "base": list(told["base"])}),
        json.dumps({**told, "experts": [], "scales": []}),
        json.dumps(told).replace('"scales": [', '"scales": [NaN, '),
    ):  # fmt: skip
        save_file(tensors, "broken.safetensors", {KEY: broken})
        with pytest.raises(SoupError, match="what it says of its experts is not readable"):
            modelsoup.get_expert("broken.safetensors", OUT, base=BASE, expert=1)
    for name, change in (
        ("masks.large", tensors["masks.large"][:, :-1].copy()),
        ("masks.kernel", tensors["masks.kernel"].astype(np.int16)),
        ("shared.kernel", tensors["shared.kernel"].astype(np.int32)),
        ("another", np.zeros(1, np.float32)),
    ):
        save_file({**tensors, name: change}, "broken.safetensors", {KEY: json.dumps(told)})
        with pytest.raises(SoupError, match="does not hold what it says: "):
            modelsoup.get_expert("broken.safetensors", OUT, base=BASE, expert=1)
    assert not Path(OUT).exists()


def changed(name: str, **tensors: np.ndarray | None) -> None:
    state = {**load_file(f"{name}.safetensors"), **tensors}
    save_file({n: v for n, v in state.items() if v is not None}, f"{name}.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"kernel": None}, "digits.safetensors lacks kernel, which base.safetensors has"),
        ({"head": np.ones(3, np.float32)}, "has head, which base.safetensors has not"),
        ({"kernel": np.ones((3, 4), np.float32)}, "another shape than base.safetensors in kernel"),
        ({"scalar": np.array(np.nan, np.float32)}, "NaN or infinity in scalar of digits"),
        (
            {"layers.0.weight_scale": np.ones(1, np.float32),
             "layers.0.weight": np.ones((37, 19), ml_dtypes.float8_e4m3fn)},
            "holds codes (layers.0.weight), whose differences mean nothing: dequantise it first",
        ),
    ],
)  # fmt: skip
def test_models_that_are_not_of_one_base_are_refused(
    tensors: dict[str, np.ndarray | None], said: str
) -> None:
    changed("digits", **tensors)
    with pytest.raises(SoupError) as error:
        pack()
    assert said in str(error.value)
    assert not Path(PACKED).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ties"}, "no single expert can be had back of 'ties' (it can of emr and con"),
        ({"method": "emrr"}, "of 'emrr'; did you mean 'emr'?"),
        ({"method": "consensus", "parameters": {"k": 1}}, "'k' decides what is merged"),
        ({"parameters": {"expert": 1}}, "'expert' decides what is merged"),
        ({"parameters": {"threshold": 1}}, "'emr' has no parameter 'threshold'"),
        ({"method": "consensus", "parameters": {"threshold": [1, 2]}}, "2 values for 3 models"),
        ({"dtype": "int8"}, "int8"),
        ({"models": "cars.safetensors"}, "models"),
        ({"models": []}, "there are no models to pack"),
        ({"base": "nothing.safetensors"}, "nothing.safetensors"),
    ],
)
def test_a_wrong_wish_is_one_sentence_and_no_output(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SoupError) as error:
        pack(**options)
    assert said in str(error.value)
    assert len(error.value.args) == 1
    assert not Path(PACKED).exists()


def test_experts_are_one_file_and_replace_no_model() -> None:
    with pytest.raises(SoupError, match=r"experts are one file, and packed does not end in"):
        modelsoup.pack_experts(MODELS, "packed", base=BASE)
    before = Path(BASE).read_bytes()
    with pytest.raises(SoupError, match=r"base\.safetensors"):
        modelsoup.pack_experts(MODELS, BASE, base=BASE, force=True)
    assert Path(BASE).read_bytes() == before


def test_what_is_too_large_for_a_dtype_is_told() -> None:
    changed("digits", large=load_file(BASE)["large"] + np.float32(1e6))
    with pytest.raises(SoupError, match="large is too large for F16: give another dtype"):
        pack(dtype="f16")
