"""What is told of models that look unrelated, before they are merged."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import modelsoup
from modelsoup.merging.related import UNRELATED, likenesses
from modelsoup.terminal.cli import main

LAYERS = 6
Weights = dict[str, np.ndarray]


def net(seed: int, start: Weights | None = None, moved: float = 1.0, side: int = 64) -> Weights:
    """A network drawn at random, or one that was moved away from another."""
    generator = np.random.default_rng(seed)
    made: Weights = {}
    for layer in range(LAYERS):
        for name, shape in (("weight", (side, side)), ("gain", (4 * side * side,))):
            key = f"layers.{layer}.{name}"
            drawn = generator.normal(size=shape).astype(np.float32)
            if name == "gain":  # alike in all networks, as gains of norms are
                made[key] = 1 + 0.01 * drawn
            else:
                made[key] = drawn if start is None else start[key] + np.float32(moved) * drawn
    return made


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two networks that were trained apart, and one that was tuned a long way from the first."""
    monkeypatch.chdir(tmp_path)
    first = net(0)
    for name, weights in (("a", first), ("b", net(1)), ("tuned", net(2, first))):
        save_file(weights, tmp_path / f"{name}.safetensors")
    return tmp_path


def soup(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def told(models: list[str], **options: object) -> list[str]:
    report = modelsoup.merge(models, "x.safetensors", dry_run=True, **options)  # type: ignore[arg-type]
    return [notice.message for notice in report.notices if notice.kind == "unrelated"]


A, B, TUNED = "a.safetensors", "b.safetensors", "tuned.safetensors"


def test_models_trained_apart_are_told_before_and_after_the_merge() -> None:
    for options in (["--dry-run"], []):
        done = soup("merge", A, B, "-o", "x.safetensors", *options)
        assert done.exit_code == 0
        said = " ".join(done.stderr.split())
        assert said.startswith("warning: a.safetensors and b.safetensors look unrelated: of 6 ")
        assert "(merge what was tuned from one start; soup diff shows each tensor)" in said
    refused = soup("merge", A, B, "-o", "y.safetensors", "--strict")
    assert refused.exit_code == 1
    assert "look unrelated" in refused.stderr
    assert not Path("y.safetensors").exists()


def test_what_was_tuned_from_one_start_may_go_far_and_is_merged_without_a_word() -> None:
    assert told([A, TUNED]) == []
    assert soup("merge", A, TUNED, "-o", "x.safetensors", "--strict").stderr == ""
    (found,) = likenesses(
        modelsoup.plan_merge([*map(modelsoup.open_checkpoint, (A, TUNED))], modelsoup.Recipe())
    )
    assert found.middle == pytest.approx(2**-0.5, abs=0.03)  # as far as from zero
    assert (found.first.name, found.second.name, len(found.cosines)) == (A, TUNED, LAYERS)


def test_models_are_compared_with_their_base_and_each_is_told() -> None:
    models, options = [TUNED, B], {"method": "task_arithmetic", "weights": [1, 1]}
    assert [said.split(" look")[0] for said in told(models, base=A, **options)] == [
        "a.safetensors and b.safetensors"
    ]
    assert [said.split(" look")[0] for said in told([A, TUNED], base=B, **options)] == [
        "b.safetensors and a.safetensors", "b.safetensors and tuned.safetensors",
    ]  # fmt: skip


def test_the_cosine_is_that_of_the_middle_tensor_on_the_edge_of_what_is_told() -> None:
    """Where most tensors are alike, others may be new: a head, or half of the layers."""
    first, other = net(0), net(1)
    for alike, is_told in ((2, True), (4, False)):
        mixed = {
            name: first[name] if int(name.split(".")[1]) < alike else values
            for name, values in other.items()
        }
        save_file(mixed, "mixed.safetensors")
        assert bool(told([A, "mixed.safetensors"])) is is_told
    for cosine, is_told in ((UNRELATED - 0.08, True), (UNRELATED + 0.08, False)):
        save_file(net(5, first, (cosine**-2 - 1) ** 0.5), "far.safetensors")
        assert bool(told([A, "far.safetensors"])) is is_told


def test_nothing_is_said_where_it_could_not_be_known() -> None:
    small = [net(seed, side=31) for seed in (0, 1)]  # fewer than 1024 elements
    halves = [
        {n: v for n, v in net(seed).items() if int(n.split(".")[1]) < 2 or "gain" in n}
        for seed in (0, 1)
    ]  # two matrices
    zeros = [{n: v if "gain" in n else 0 * v for n, v in net(seed).items()} for seed in (0, 1)]
    for pair in (small, halves, zeros):
        for name, weights in zip("cd", pair, strict=True):
            save_file(weights, f"{name}.safetensors")
        assert told(["c.safetensors", "d.safetensors"]) == []
    assert told([A, B], layers={"*.weight": "first", "*": "merge"}) == []  # kept from one


def test_layers_of_one_model_and_layers_beside_other_layers_are_not_compared() -> None:
    assert told([A], method="passthrough", slices=["1[0:4]", "1[2:6]"]) == []
    assert told([A, A], slices=["1[0:3]+2[3:6]"]) == []
    assert told([A, TUNED], slices=["1[0:3]+2[3:6]"]) == []
    assert told([A, TUNED], slices=["1[0:6]+2[0:6]"]) == []
    assert len(told([A, B], slices=["1[0:6]+2[0:6]"])) == 1


def test_of_a_large_tensor_what_lies_in_its_middle_is_looked_at() -> None:
    first, other = net(0, side=128), net(1, side=128)
    save_file(first, "c.safetensors")
    for inside, is_told in ((True, True), (False, False)):
        mixed = dict(first)
        for name in [name for name in first if name.endswith("weight")]:
            middle = np.zeros(128 * 128, bool)
            middle[4096:-4096] = True  # 8192 of 16384 elements
            chosen = (middle if inside else ~middle).reshape(128, 128)
            mixed[name] = np.where(chosen, other[name], first[name])
        save_file(mixed, "d.safetensors")
        assert bool(told(["c.safetensors", "d.safetensors"])) is is_told


def test_a_value_that_is_no_number_hides_its_tensor_alone() -> None:
    broken = net(1)
    for layer in range(3):
        broken[f"layers.{layer}.weight"][:] = np.nan
    save_file(broken, "broken.safetensors")
    (said,) = told([A, "broken.safetensors"])
    assert "of 3 tensors that were looked at" in said
    broken["layers.3.weight"][:] = np.inf
    save_file(broken, "broken.safetensors")
    assert told([A, "broken.safetensors"]) == []


def test_models_are_compared_whatever_they_are_stored_in() -> None:
    save_file({n: v.astype(ml_dtypes.bfloat16) for n, v in net(0).items()}, "c.safetensors")
    save_file({n: v.astype(np.float16) for n, v in net(1).items()}, "d.safetensors")
    assert told([A, "c.safetensors"]) == []
    assert len(told(["c.safetensors", "d.safetensors"])) == 1


def test_the_look_is_counted_in_nothing_that_a_merge_tells_and_changes_no_byte() -> None:
    read = []
    for second in (B, TUNED):
        report = modelsoup.merge([A, second], "x.safetensors", force=True, fsync=False)
        read.append(report.bytes_read)
    assert read[0] == read[1]
    found = modelsoup.open_checkpoint("x.safetensors")["layers.5.weight"]
    want = (net(0)["layers.5.weight"] + net(2, net(0))["layers.5.weight"]) / 2
    np.testing.assert_array_equal(found, want)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_a_look_at_models_of_any_size_and_number_reads_a_few_megabytes() -> None:
    def read_by_now() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    large = {f"{n}.weight": np.zeros((1024, 1024), np.float32) for n in range(20)}
    save_file(large, "c.safetensors")
    save_file(large, "d.safetensors")
    before = read_by_now()
    told(["c.safetensors", "d.safetensors"])
    few = read_by_now() - before
    told(["c.safetensors", "d.safetensors"] * 30)
    assert 1 << 18 < few < 3 << 20
    assert read_by_now() - before - few < 20 * few


def test_of_many_models_some_from_all_over_are_compared() -> None:
    for seed in range(1, 41):
        save_file(net(seed), f"{seed}.safetensors")
    found = told([A, *(f"{seed}.safetensors" for seed in range(1, 41))])
    assert len(found) == 14  # every third of forty
    assert "a.safetensors and 40.safetensors" in found[-1]


def test_a_plan_tells_the_leaves_that_look_unrelated() -> None:
    text = (
        "soup: 1\nmodels: {{a: a.safetensors, b: {}, c: tuned.safetensors}}\n"
        "tree: {{pair: [a, b, a, c]}}\n"
    )
    Path("tree.yaml").write_text(text.format(B))
    done = soup("plan", "tree.yaml", "--json")
    (said,) = json.loads(done.stdout)["warnings"]
    assert "a.safetensors and b.safetensors look unrelated" in said
    assert "warning: " in soup("plan", "tree.yaml").stderr
    Path("tree.yaml").write_text(text.format(TUNED))
    assert json.loads(soup("plan", "tree.yaml", "--json").stdout)["warnings"] == []


def test_a_configuration_of_mergekits_is_looked_at_with_its_base() -> None:
    Path("mergekit.yml").write_text(
        "models:\n"
        "  - {model: b.safetensors, parameters: {weight: 1}}\n"
        "  - {model: tuned.safetensors, parameters: {weight: 1}}\n"
        "merge_method: task_arithmetic\nbase_model: a.safetensors\ndtype: float32\n"
    )
    said = " ".join(soup("plan", "mergekit.yml").stderr.split())
    assert said.count("look unrelated") == 1
    assert "a.safetensors and b.safetensors look unrelated" in said


def test_a_tree_keeps_the_warning_in_the_records_of_its_merges() -> None:
    tree = modelsoup.binary_tree([A, B])
    report = modelsoup.run(tree, "x.safetensors", store="store")
    (key,) = [node.key for node in report.plan.nodes.values() if node.kind == "merge"]
    (said,) = modelsoup.Store("store").entry(str(key)).record["notices"]
    assert "a.safetensors and b.safetensors look unrelated" in said
