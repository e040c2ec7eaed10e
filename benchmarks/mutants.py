"""Which small changes of the code do the tests notice? A seeded sample of cosmic-ray's mutants.

    pip install -c constraints.txt -e '.[test,mutants]'
    python benchmarks/mutants.py --sample 200 --seed 0 --jobs 2

A place in the code is drawn, and one of cosmic-ray's operators that can change it. The change is
made in a copy of the tree, and the tests of its module run until one fails; a mutant that outlives
them all is shown. Before that they run once on the code as it is: they must pass, and how long each
file takes decides their order and the time after which a mutant that hangs counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).parent.parent
PACKAGES = ("modelsoup", "adapters/modelsoup_i2i", "adapters/modelsoup_openvino")
# Which tests, besides those that are called as a module is, tell whether it is right: `runner` is
# tests/test_runner.py, and for an adapter tests/i2i/test_i2i_runner.py.
TESTS = {
    "modelsoup": {
        "__init__": "cli errors",
        "__main__": "cli",
        "errors": "cli hints",
        "version": "cli merge",
        "files/adapter_writer": "lora lora_peft",
        "files/adapters": "lora lora_peft",
        "files/cache": "cache compiled_loops",
        "files/checkpoint": "model_folders header_fuzz",
        "files/companions": "model_folders checkpoint writer layout tokenizers",
        "files/dtypes": "checkpoint",
        "files/header": "checkpoint header_fuzz",
        "files/hub": "mergekit",
        "files/inspection": "cli",
        "files/low_rank": "quantized lora",
        "files/names": "rules layout tokenizers",
        "files/placing": "writer merge",
        "files/quantized": "merge",
        "files/reading": "errors checkpoint",
        "files/tokenizer": "tokenizers mergekit",
        "files/torch_convert": "convert",
        "files/torch_load": "convert pickles",
        "files/writer": "merge model_folders",
        "files/yaml_text": "tree cli plan_fuzz",
        "merging/card": "mergekit",
        "merging/compare": "cli",
        "merging/compiled": "fused compiled_loops merge",
        "merging/blocks": "merge methods fused golden quantized",
        "merging/engine": "merge methods fused golden",
        "merging/experts": "",
        "merging/extraction": "lora lora_peft",
        "merging/factors": "lora",
        "merging/folding": "lora lora_peft",
        "merging/inputs": "merge fused lora",
        "merging/jobs": "merge methods fused golden",
        "merging/layout": "layout mergekit",
        "merging/lineage": "merge cli runner layout",
        "merging/lora": "lora_peft",
        "merging/merge": "cli model_folders golden",
        "merging/methods/__init__": "methods",
        "merging/methods/agreement": "method_laws methods",
        "merging/methods/averages": "methods method_laws merge",
        "merging/methods/masks": "methods_beyond",
        "merging/methods/pairs": "method_laws methods",
        "merging/methods/post_processing": "methods_beyond",
        "merging/methods/asking": "methods golden",
        "merging/methods/listing": "methods cli method_laws",
        "merging/methods/parameters": "methods cli",
        "merging/methods/registry": "methods cli",
        "merging/methods/robust": "methods_beyond",
        "merging/methods/sparsified": "method_laws methods",
        "merging/methods/spectral": "methods_beyond",
        "merging/methods/spherical": "methods method_laws merge",
        "merging/methods/task_vectors": "methods merge",
        "merging/methods/weighted": "methods_beyond",
        "merging/hints": "merge rules cli",
        "merging/nonfinite": "merge fused",
        "merging/plan": "merge rules hints quantized cli fused",
        "merging/planning": "merge rules hints quantized cli",
        "merging/preparation": "rules methods hints merge",
        "merging/proposals": "layout",
        "merging/recipe": "merge rules hints cli",
        "merging/reductions": "methods method_laws merge",
        "merging/thresholds": "methods method_laws merge",
        "merging/kept": "methods method_laws merge",
        "merging/related": "",
        "merging/renames": "layout hints",
        "merging/rules": "merge hints",
        "merging/snapshots": "average",
        "merging/sources": "lora tokenizers",
        "merging/verification": "cli merge fused",
        "merging/vocabularies": "tokenizers",
        "merging/threads": "merge cli",
        "running/executors": "clusters runner",
        "running/node": "fused trainer runner store",
        "running/processes": "runner signals",
        "running/runner": "fused store signals train_command",
        "terminal/cli": "hints signals",
        "terminal/cli_average": "average",
        "terminal/cli_experts": "experts",
        "terminal/cli_lora": "lora",
        "terminal/cli_merge": "cli hints mergekit lora",
        "terminal/cli_report": "report",
        "terminal/cli_shared": "cli",
        "terminal/cli_train": "train_command",
        "terminal/cli_tree": "runner signals train_command",
        "terminal/curves": "report",
        "terminal/picture": "runner report",
        "terminal/show": "cli train_command",
        "terminal/show_tree": "runner",
        "terminal/shown": "report",
        "terminal/subject": "report",
        "trees/card": "beside",
        "trees/lineage": "trainer",
        "trees/mergekit": "mergekit beside",
        "trees/operations": "tree runner",
        "trees/keys": "keys store tree runner beside",
        "trees/plan": "tree trainer runner keys beside",
        "trees/price": "tree runner fused",
        "trees/reproduce": "lineage runner report beside",
        "trees/store": "fused runner keys",
        "trees/trainer": "torch_bridge runner store train_command",
        "trees/trainer_options": "train_command",
        "trees/tree_yaml": "tree trainer runner plan_fuzz beside",
        "trees/virtual": "tree trainer train_command",
    },
    "adapters/modelsoup_i2i": {
        "__init__": "networks metrics",
        "cli": "docs sources train translate use",
        "cli_compare": "compare",
        "cli_evaluate": "metrics class_training fluctuation",
        "cli_import": "cut official_cyclegan official_gan",
        "cli_modalities": "modalities",
        "cli_shared": "translate metrics",
        "measuring/by_class": "by_class",
        "measuring/class_evaluation": "by_class class_training",
        "measuring/clusters": "clusters",
        "measuring/collapse": "collapse training by_class",
        "measuring/comparison": "compare",
        "measuring/comparison_page": "compare",
        "measuring/comparison_plan": "compare",
        "measuring/cost": "compare",
        "measuring/evaluation": "metrics cyclegan training",
        "measuring/extractors": "metrics classifier",
        "measuring/fluctuation": "fluctuation",
        "measuring/kept": "kept",
        "measuring/metric_names": "metrics by_class classifier",
        "measuring/modalities": "modalities",
        "measuring/metrics": "metrics kept classifier",
        "networks/adain": "adain balagan munit",
        "networks/antialiased": "cut",
        "networks/antialiaseds": "cut",
        "networks/cam": "cam",
        "networks/cams": "cam",
        "networks/classifier": "classifier",
        "networks/classifiers": "classifier",
        "networks/described": "networks",
        "networks/devices": "step translate",
        "networks/layers": "networks step translate pix2pix",
        "networks/modalities": "modality",
        "networks/modality": "modality",
        "networks/munit": "munit",
        "networks/patch": "networks official_cyclegan pix2pix",
        "networks/patches": "networks pix2pix",
        "networks/resnet": "networks official_cyclegan step",
        "networks/stargan": "stargan",
        "networks/stargans": "stargan",
        "networks/starganv2": "starganv2",
        "networks/stylegan": "stylegan stylegan_trainers",
        "networks/stylegans": "stylegan stylegan_trainers official_gan",
        "networks/nicegan": "cam",
        "networks/ugatit": "cam",
        "networks/unet": "pix2pix",
        "networks/unets": "pix2pix",
        "networks/funit": "balagan balagan_reference contract",
        "networks/funits": "balagan official_funit contract",
        "networks/biggan": "biggan deepi2i_reference",
        "use/models": "training translate deepi2i use style",
        "use/pages": "deepi2i use style",
        "use/references": "style",
        "networks/biggans": "biggan official_gan",
        "networks/repeatable": "repeatable",
        "networks/shapes": "networks official_cyclegan pix2pix biggan",
        "networks/spectral": "biggan deepi2i_reference use",
        "networks/winograd": "step networks",
        "pictures/arrays": "channels",
        "pictures/attributes": "attributes",
        "pictures/augmentation": "augmentation",
        "pictures/cache": "data large cyclegan",
        "pictures/draws": "cut data pairs classes attributes large step cyclegan views modality",
        "pictures/folders": "data pairs classes cyclegan",
        "pictures/hdf5": "classes sources",
        "pictures/images": "translate data channels",
        "pictures/modalities": "modalities balagan",
        "pictures/packages": "sources",
        "pictures/picture": "pairs classes attributes",
        "pictures/sheets": "cyclegan",
        "pictures/views": "views",
        "pictures/transforms": "data cyclegan deployment",
        "trainers/balagan": "balagan balagan_reference contract",
        "trainers/classifier": "classifier",
        "trainers/cut": "cut contract",
        "trainers/cyclegan": "losses step deployment",
        "trainers/deepi2i": "deepi2i stylegan_trainers deepi2i_reference",
        "trainers/family": "deepi2i stylegan_trainers",
        "trainers/gan": "deepi2i stylegan_trainers",
        "trainers/modality": "modality modalities",
        "trainers/munit": "munit",
        "trainers/on_biggan": "deepi2i",
        "trainers/on_gan": "deepi2i stylegan_trainers",
        "trainers/on_stylegan": "stylegan_trainers",
        "trainers/self_init": "deepi2i stylegan_trainers pipelines",
        "trainers/stargan": "stargan attributes",
        "trainers/starganv2": "starganv2",
        "trainers/transferi2i": "deepi2i stylegan_trainers pipelines",
        "trainers/nice_gan": "cam",
        "trainers/ugatit": "cam",
        "training/attributed": "attributes",
        "training/classes": "classes attributes",
        "training/curves": "training",
        "training/data": "cyclegan pairs classes",
        "training/description": "cyclegan networks training contract",
        "training/compiling": "compiling",
        "training/graphs": "graphs",
        "training/lineages": "deployment",
        "training/losses": "cut step modality",
        "training/modalities": "modality modalities",
        "training/options": "cyclegan pairs classes augmentation",
        "training/players": "step cyclegan training device graphs",
        "training/pool": "data step graphs",
        "training/probe": "compare",
        "training/processes": "step cyclegan",
        "training/ranges": "cyclegan training",
        "training/session": "step cyclegan training pix2pix device",
        "training/sorting": "balagan",
        "training/stage": "step device",
        "training/cast": "step cyclegan training pix2pix deepi2i",
        "training/state": "step cyclegan training pix2pix device",
        "training/step": "step cyclegan training pix2pix device deepi2i",
        "training/trainer": "cyclegan deployment networks contract",
        "training/turns": "step",
        "training/watch": "cyclegan",
        "use/official_cam": "cam",
        "use/official_cyclegan": "cut pix2pix",
        "use/classes": "classes use attributes",
        "use/generators": "networks translate pix2pix use",
        "use/official": "cut pix2pix official_cyclegan official_gan official_funit",
        "use/official_funit": "official_funit",
        "use/modalities": "modalities modality",
        "use/places": "translate use",
        "use/official_gan": "official_gan",
        "use/sampling": "use",
        "use/official_stargan": "stargan attributes",
        "use/official_starganv2": "starganv2",
        "use/export": "contract style translate use",
        "use/translate": "metrics use",
        "use/translator": "cyclegan use style attributes",
    },
    "adapters/modelsoup_openvino": {
        "__init__": "path",
        "benchmark": "measure use joined",
        "cli": "docs faults use",
        "deliver": "place path joined",
        "deploy": "faults path joined trainers",
        "export": "path faults joined",
        "infer": "use joined",
        "measure": "quality path joined",
        "qat": "path faults joined",
        "quantise": "measure path faults joined trainers",
        "report": "measure path joined",
        "trainer": "faults path place",
        "versions": "faults",
    },
}


def tests_of(module: str) -> list[str]:
    """The files that test a module, by paths within the tree."""
    (package,) = (package for package in PACKAGES if module.startswith(f"{package}/"))
    adapter = package.partition("modelsoup_")[2]
    prefix = f"tests/{adapter}/test_{adapter}_" if adapter else "tests/test_"
    name = module.removeprefix(f"{package}/").removesuffix(".py")
    own = f"{prefix}{name.rpartition('/')[2]}.py"
    others = [f"{prefix}{other}.py" for other in TESTS[package].get(name, "").split()]
    others.append("tests/test_surface.py")  # of all modules
    return [own, *others] if (ROOT / own).exists() else others


def modules() -> list[str]:
    every = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = (path for path in every if path.stat().st_size)  # of a room there is but the name
    return sorted(str(path.relative_to(ROOT)) for path in found)


def mutants() -> dict[tuple[str, tuple[int, int]], list[MutationSpec]]:
    """All that cosmic-ray would make, by place; none within annotations, which decide nothing."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import use_db

    with tempfile.TemporaryDirectory() as folder, use_db(Path(folder) / "session.sqlite") as db:
        init([Path(module) for module in modules()], db, {})
        found = [mutation for item in db.work_items for mutation in item.mutations]
    annotated = {module: set(annotations(module)) for module in modules()}
    places: dict[tuple[str, tuple[int, int]], list[MutationSpec]] = {}
    for mutation in sorted(found, key=lambda m: (m.module_path, m.operator_name, m.occurrence)):
        module, start = str(mutation.module_path), tuple(mutation.start_pos)
        if not any(first <= start < last for first, last in annotated[module]):
            places.setdefault((module, start), []).append(mutation)
    return places


def annotations(module: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end, as (line, column)."""
    for node in ast.walk(ast.parse((ROOT / module).read_text("utf-8"))):
        for field in ("annotation", "returns"):
            part = getattr(node, field, None)
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows of it, so that nobody's work is changed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def command(copy: Path, tests: list[str]) -> str:
    """Runs tests on a copy's code, whatever is installed, until the first one fails."""
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not slow", *tests]
    path = f"{copy}{os.pathsep}{copy / 'adapters'}"
    return shlex.join(["sh", "-c", 'cd "$1" && PYTHONPATH=$2 && export PYTHONPATH && shift 2 && '
                       'exec "$@"', "-", str(copy), path, *run])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="of modules whose path contains this")
    asked = parser.parse_args()
    os.chdir(ROOT)
    places = {place: made for place, made in mutants().items() if asked.only in place[0]}
    rng = random.Random(asked.seed)
    drawn = rng.sample(sorted(places), min(asked.sample, len(places)))
    sample = [rng.choice(places[place]) for place in drawn]
    print(f"{len(sample)} of {len(places)} places", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(asked.jobs):
            copies.put(copy_of_the_tree(Path(folder) / str(number)))
        with ThreadPoolExecutor(asked.jobs) as pool:
            files = sorted({file for m in sample for file in tests_of(str(m.module_path))})
            seconds = dict(zip(files, pool.map(lambda f: measured(f, copies), files), strict=True))
            fates = list(pool.map(lambda m: fate(m, seconds, copies), sample))
    print()
    for package in PACKAGES:
        counts = Counter(f for m, f in zip(sample, fates, strict=True) if inside(m, package))
        print(f"{package}: {counts['killed']} of {counts['killed'] + counts['survived']} noticed")
    made = [fate for fate in fates if fate != "not made"]
    print(f"{made.count('killed') / len(made):.1%} of {len(made)} noticed")


def inside(mutation: MutationSpec, package: str) -> bool:
    return str(mutation.module_path).startswith(f"{package}/")


def measured(file: str, copies: SimpleQueue[Path]) -> float:
    """How long a file of tests takes on the code as it is."""
    from cosmic_ray.testing import TestOutcome, run_tests

    copy = copies.get()
    start = time.monotonic()
    outcome, output = run_tests(command(copy, [file]), 1800)
    copies.put(copy)
    if outcome != TestOutcome.SURVIVED:
        sys.exit(f"{file} fails before anything is changed:\n{output}")
    took = time.monotonic() - start
    print(f"{took:5.0f} s  {file}", flush=True)
    return took


def fate(mutation: MutationSpec, seconds: dict[str, float], copies: SimpleQueue[Path]) -> str:
    """ "killed", "survived", which is shown, or "not made"."""
    from attrs import evolve
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import WorkerOutcome

    module = str(mutation.module_path)
    tests = sorted(tests_of(module), key=seconds.__getitem__)
    copy = copies.get()
    start = time.monotonic()
    result = mutate_and_test(
        [evolve(mutation, module_path=copy / module)], command(copy, tests),
        60 + 3 * sum(seconds[file] for file in tests),
    )  # fmt: skip
    copies.put(copy)
    if result.worker_outcome != WorkerOutcome.NORMAL:  # its operator cannot change that place
        return "not made"
    line, operator = mutation.start_pos[0], mutation.operator_name.removeprefix("core/")
    shown = f"{result.test_outcome.value:9}{time.monotonic() - start:5.0f} s  {module}:{line}"
    print(f"{shown}  {operator}", flush=True)
    if result.test_outcome.value == "survived":
        print("\n".join(result.diff.splitlines()[3:]), flush=True)
    return result.test_outcome.value


if __name__ == "__main__":
    main()
