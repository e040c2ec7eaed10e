"""Time and memory of merges, beside the physical limit and other tools, in the same run.

    python benchmarks/merge.py --torch-python ~/torch/bin/python --mergekit ~/mergekit/bin

Data (up to 25 GB for all cases) are made once, under --dir. The rows of a case take turns
within each round, so what else the machine does falls on all of them, and every ratio is taken
within a round. Wall seconds include the start of the interpreter. The *limit* is one thread of
Python that only reads every input and writes as many bytes as the output has. Other tools do not
fsync, so they are compared with runs that do not either. For Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path

# Only the standard library above, and data are made and checked in other processes: Linux counts
# what this process holds when it starts a child into the child's peak memory.
DATA = Path(__file__).with_name("data.py")

# Programs that are measured; arguments: output, then what each needs, then the inputs.
LIMIT = """
import os, sys
output, fsync, *inputs = sys.argv[1:]
sources = [os.open(path, os.O_RDONLY) for path in inputs]
target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
buffer = memoryview(bytearray(2 << 20))
for offset in range(0, os.fstat(sources[0]).st_size, len(buffer)):
    for source in sources:
        length = os.preadv(source, [buffer], offset)
    os.pwrite(target, buffer[:length], offset)
if fsync:
    os.fsync(target)
"""
READING = """
import os, sys
sources = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
buffer = memoryview(bytearray(2 << 20))
for offset in range(0, os.fstat(sources[0]).st_size, len(buffer)):
    for source in sources:
        os.preadv(source, [buffer], offset)
"""
# What most people write first.
TORCH_PLAIN = """
import sys
from safetensors.torch import load_file, save_file
output, first, second = sys.argv[1:]
a, b = load_file(first), load_file(second)
merged = {n: (0.5 * a[n].float() + 0.5 * b[n].float()).to(a[n].dtype) for n in a}
save_file(merged, output)
"""
# What they write when that is too slow; one in 300 elements of bfloat16 is rounded wrongly.
TORCH_LAZY = """
import sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
output, first, second = sys.argv[1:]
merged = {}
with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
    for name in a.keys():
        x, y = a.get_tensor(name), b.get_tensor(name)
        merged[name] = torch.lerp(x, y, 0.5) if x.is_floating_point() else x
save_file(merged, output)
"""
MECHA = """
import sys, torch, sd_mecha
output, method, alpha, dtype, first, second = sys.argv[1:]
dtype = getattr(torch, dtype)
recipe = getattr(sd_mecha, method)(
    sd_mecha.model(first), sd_mecha.model(second), alpha=float(alpha)
)
sd_mecha.merge(recipe, output=output, merge_dtype=dtype, output_dtype=dtype)
"""
LIGHT_IMPORT = """
import sys, modelsoup
heavy = sorted({"torch", "rich", "networkx"} & set(sys.modules))
sys.exit(f"imports {', '.join(heavy)}" if heavy else 0)
"""
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
MERGEKIT_SETTINGS = {
    "mergekit": ["--lazy-unpickle", "--quiet"],
    "mergekit, small shards": [
        *("--lazy-unpickle", "--quiet", "--async-write"),
        *("--out-shard-size", "250M", "--no-write-model-card"),
    ],
}


@dataclass(frozen=True)
class Sample:
    """One run of one program."""

    wall: float  # seconds, from before the start to after the end
    cpu: float  # seconds, user and system, of the program and its children
    rss: float  # bytes at the peak; pages of mapped files count too
    anonymous: float | None  # bytes at the peak, without pages of files; None where not known


@dataclass(frozen=True)
class Claim:
    """A quantity of a row (a key of `quantities`) and where it has to lie."""

    quantity: str
    low: float = -math.inf
    high: float = math.inf

    def verdict(self, value: float | None) -> str:
        if self.low == -math.inf:
            target = f"{self.quantity} ≤ {self.high:g}"
        elif self.high == math.inf:
            target = f"{self.quantity} ≥ {self.low:g}"
        else:
            target = f"{self.quantity} {self.low:g}-{self.high:g}"
        if value is None:
            return f"{target}: not measured"
        return f"{target}: {'met' if self.low <= value <= self.high else 'MISSED'} ({value:.3g})"


@dataclass(frozen=True)
class Row:
    """A program to measure; a row without a command is shown as not installed."""

    name: str
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    warm_up: Sequence[str] = ()  # run once, not counted
    writes: int = 0  # bytes that must be there afterwards, or the program did not do its work
    mean_of: tuple[Path, ...] = ()  # the two inputs whose mean the output must be, bit by bit
    limit: str = ""  # the row that bounds this one
    half: str = ""  # the row that does the same on half the bytes
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Case:
    title: str
    rows: list[Row]
    inputs: Sequence[Path] = ()  # read before each round, so that all rows find them in memory
    repeat: int = 1  # rounds for each round asked for


@dataclass
class Result:
    row: Row
    samples: list[Sample] = field(default_factory=list)
    error: str = ""


# ---------------------------------------------------------------------------------- measuring


# The rows set how modelsoup computes. Without bytecode files, each start compiles all it imports,
# which takes longer than the start itself; installed programs have them after their first run.
UNSET = ("MODELSOUP_FAST", "PYTHONDONTWRITEBYTECODE")


def anonymous_bytes(process: int) -> int | None:
    """Memory of a process and its descendants now, without file pages; None if not known."""
    total, pending, found = 0, [process], False
    while pending:
        folder = f"/proc/{pending.pop()}"
        try:
            with open(f"{folder}/status", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("RssAnon:"):
                        total, found = total + int(line.split()[1]) * 1024, True
                        break
            for thread in os.listdir(f"{folder}/task"):
                with open(f"{folder}/task/{thread}/children", encoding="utf-8") as file:
                    pending += map(int, file.read().split())
        except OSError:  # ended meanwhile, or not Linux
            continue
    return total if found else None


def run(row: Row, command: Sequence[str], work: Path) -> tuple[Sample, str]:
    """Run a command to its end; the text is its last line if it failed, else empty."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):  # oftener would take time from what is measured
            now = anonymous_bytes(process.pid)
            if now is not None:
                seen.append(now)

    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=work,  # not the source tree: what is installed is measured
            env={**environment, **row.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        finally:
            ended.set()
            watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()

    unit = 1 if sys.platform == "darwin" else 1024
    sample = Sample(
        wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, max(seen, default=None)
    )
    if not process.returncode:
        return sample, ""
    said = [line.strip() for line in lines if line.strip()]
    return sample, said[-1] if said else f"exit code {process.returncode}"


def wrong(row: Row, work: Path) -> str:
    """Why what a row left in `work` is not its result; empty if it is."""
    outputs = sorted(work.rglob("*.safetensors"))
    written = sum(path.stat().st_size for path in outputs)
    # Headers differ a little between tools; a missing tensor is far more than a hundredth.
    if written < 0.99 * row.writes:
        return f"wrote {written} bytes where {row.writes} were expected"
    if row.mean_of:
        done = subprocess.run(
            [sys.executable, DATA, "check", outputs[0], *row.mean_of],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return (done.stderr.strip() or "not checked").splitlines()[-1]
    return ""


def empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    # Else a run would wait, in its fsync, for what others wrote before it.
    os.sync()


def measure(case: Case, rounds: int, work: Path) -> list[Result]:
    """Run each row once a round; a row that fails is left out from then on."""
    results = [Result(row, error="" if row.command else "not installed here") for row in case.rows]
    for result in results:
        if result.row.warm_up and not result.error:
            empty(work)
            _, result.error = run(result.row, result.row.warm_up, work)
    for turn in range(rounds * case.repeat):
        for path in case.inputs:
            with path.open("rb", buffering=0) as file:
                buffer = bytearray(1 << 20)
                while file.readinto(buffer):
                    pass
        for result in results:
            if result.error:
                continue
            empty(work)
            sample, result.error = run(result.row, result.row.command, work)
            result.error = result.error or wrong(result.row, work)
            if not result.error:
                result.samples.append(sample)
            told = result.error or f"{sample.wall:.2f} s"
            print(f"  round {turn + 1}: {result.row.name}: {told}", file=sys.stderr, flush=True)
    shutil.rmtree(work)
    return results


# -------------------------------------------------------------------------------------- cases


# Ends of the names of rows: what is written may be in the page cache only, or must be on disk.
CACHED, SYNCED = "", ", fsync"
LINEAR = ["--method", "linear", "--beta", "0.5"]
SNAPSHOTS = 50
SLERP = ["--method", "slerp", "--set", "t=0.4"]
SLERP_CLAIMS = (Claim("x limit", high=3.5), Claim("x mergekit", low=8), Claim("RSS MB", high=200))
TIES_CLAIMS = (Claim("x limit", high=16), Claim("x mergekit", low=8), Claim("RSS MB", high=120))
TIES_FAST = (Claim("x limit", high=8), Claim("x mergekit", low=8), Claim("RSS MB", high=200))
# What both have: whether there is a base, parameters of each model, and of the merge.
_WEIGHT = {"weight": 0.5}
_THIN = {"weight": 0.5, "density": 0.5}
METHODS: dict[str, tuple[bool, dict[str, float], dict[str, float]]] = {
    "nuslerp": (False, _WEIGHT, {}),
    "multislerp": (False, _WEIGHT, {}),
    "karcher": (False, {}, {}),
    "task_arithmetic": (True, _WEIGHT, {}),
    "dare_linear": (True, _THIN, {}),
    "dare_ties": (True, _THIN, {}),
    "della": (True, {**_THIN, "epsilon": 0.1}, {}),
    "breadcrumbs": (True, {**_THIN, "gamma": 0.01}, {}),
    "model_stock": (True, {}, {}),
    "sce": (True, {}, {"select_topk": 0.5}),
    "arcee_fusion": (True, {}, {}),
    "nearswap": (True, {}, {"t": 0.001}),
}


def ties_options(base: Path) -> list[str]:
    return [
        *("--method", "ties", "--base", str(base)),
        *("--set", "density=0.5", "--set", "weight=0.5"),
    ]


@dataclass(frozen=True)
class Setup:
    """Where data lie, and each tool: an interpreter, or mergekit's bin folder, or None."""

    directory: Path
    scale: float
    python: str
    fast: str | None
    torch: str | None
    mecha: str | None
    mergekit: str | None

    @property
    def work(self) -> Path:
        """A folder emptied before each run."""
        return self.directory / "work"

    @property
    def output(self) -> str:
        return str(self.work / "merged.safetensors")

    def data(self, kind: str, *members: int, scale: float = 1) -> list[Path]:
        """Input files; member 0 of a family is the base."""
        print(f"  data: {kind}", file=sys.stderr)
        numbers = map(str, members)
        done = subprocess.run(
            [
                *(sys.executable, DATA, "make", self.directory, kind),
                *("--scale", str(scale * self.scale), "--members", *numbers),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.returncode)
        return [Path(path) for path in json.loads(done.stdout)]


def limits(
    setup: Setup,
    inputs: Sequence[Path],
    *,
    kinds: Sequence[str] = (CACHED, SYNCED),
    note: str = "",
) -> list[Row]:
    writes = inputs[0].stat().st_size
    return [
        Row(
            f"limit{kind}{note}",
            (setup.python, "-c", LIMIT, setup.output, kind, *map(str, inputs)),
            writes=writes,
        )
        for kind in kinds
    ]


def soups(
    setup: Setup,
    inputs: Sequence[Path],
    options: Sequence[str],
    *,
    claims: tuple[Claim, ...] = (),
    fast_claims: tuple[Claim, ...] = (),
    kinds: Sequence[str] = (CACHED, SYNCED),
    note: str = "",
) -> list[Row]:
    """modelsoup with numpy alone and with numba; without fsync, and with it, its default."""
    rows = []
    for name, python, environment, targets in (
        ("modelsoup, numpy", setup.python, {"MODELSOUP_FAST": "0"}, claims),
        ("modelsoup, numba", setup.fast, {}, fast_claims),
    ):
        for kind in kinds:
            command = (
                *(str(python), "-m", "modelsoup", "merge", *map(str, inputs)),
                *("-o", setup.output, "-q", *options, *([] if kind == SYNCED else ["--no-fsync"])),
            )
            row = Row(
                f"{name}{kind}{note}",
                command if python else (),
                environment,
                # The first run compiles its loops and its bytecode, and keeps them for the next.
                warm_up=command if python and kind == CACHED else (),
                writes=inputs[0].stat().st_size,
                mean_of=tuple(inputs) if options == LINEAR else (),
                limit=f"limit{kind}{note}",
                # mergekit does not fsync.
                claims=tuple(
                    claim for claim in targets if kind == CACHED or claim.quantity != "x mergekit"
                ),
            )
            rows.append(row)
    return rows


def scripts(setup: Setup, inputs: Sequence[Path]) -> list[Row]:
    """The mean of two checkpoints with safetensors and torch."""
    python = setup.torch
    return [
        Row(
            name,
            (python, "-c", code, setup.output, *map(str, inputs)) if python else (),
            warm_up=(python, "-c", "import torch, safetensors.torch") if python else (),
            writes=inputs[0].stat().st_size,
            limit="limit",
        )
        for name, code in (("torch, plain", TORCH_PLAIN), ("torch, lazy", TORCH_LAZY))
    ]


def mergekit(
    setup: Setup, program: str, config: Mapping[str, object], writes: int, settings: Sequence[str]
) -> list[Row]:
    if not setup.mergekit:
        return [Row("mergekit")]
    command = str(Path(setup.mergekit) / program)
    # JSON is YAML, so no YAML library is needed to write it.
    path = setup.directory / f"{program}-{config['merge_method']}.yml"
    path.write_text(json.dumps(config, indent=2))
    return [
        Row(
            name,
            (command, str(path), str(setup.work / "merged"), *MERGEKIT_SETTINGS[name]),
            {"HF_HUB_OFFLINE": "1"},
            warm_up=(command, "--help"),
            writes=writes,
            limit="limit",
        )
        for name in settings
    ]


def mecha(setup: Setup, method: str, alpha: float, dtype: str, inputs: Sequence[Path]) -> Row:
    if not setup.mecha:
        return Row("sd-mecha")
    arguments = (setup.output, method, str(alpha), dtype, *map(str, inputs))
    return Row(
        "sd-mecha",
        (setup.mecha, "-c", MECHA, *arguments),
        warm_up=(setup.mecha, "-c", "import sd_mecha"),
        writes=inputs[0].stat().st_size,
        limit="limit",
    )


def linear(setup: Setup) -> Case:
    a, b = inputs = setup.data("llama", 1, 2)
    size = a.stat().st_size
    config = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": str(p.parent), "parameters": {"weight": 0.5}} for p in (a, b)],
    }
    return Case(
        f"Linear: the mean of two models of {size / 1e9:.2f} GB, bfloat16",
        [
            *limits(setup, inputs),
            *soups(
                setup,
                inputs,
                LINEAR,
                claims=(Claim("x limit", high=2), Claim("RSS MB", high=120)),
                fast_claims=(
                    Claim("x limit", high=1.3),
                    Claim("x mergekit", low=6),
                    Claim("RSS MB", high=200),
                ),
            ),
            *scripts(setup, inputs),
            *mergekit(setup, "mergekit-yaml", config, size, list(MERGEKIT_SETTINGS)),
            mecha(setup, "weighted_sum", 0.5, "bfloat16", inputs),
        ],
        inputs,
    )


def slerp(setup: Setup) -> Case:
    a, b = inputs = setup.data("llama", 1, 2)
    size = a.stat().st_size
    config = {
        "merge_method": "slerp",
        "dtype": "bfloat16",
        "base_model": str(a.parent),
        "models": [{"model": str(p.parent)} for p in (a, b)],
        "parameters": {"t": 0.4},
    }
    return Case(
        f"Slerp: two models of {size / 1e9:.2f} GB, bfloat16, t = 0.4",
        [
            *limits(setup, inputs),
            *soups(setup, inputs, SLERP, claims=SLERP_CLAIMS, fast_claims=SLERP_CLAIMS),
            # How shards are written matters little here, and each run takes minutes.
            *mergekit(setup, "mergekit-yaml", config, size, ["mergekit"]),
            mecha(setup, "slerp", 0.4, "bfloat16", inputs),
        ],
        inputs,
    )


def ties(setup: Setup) -> Case:
    base, a, b = inputs = setup.data("llama", 0, 1, 2)
    size = a.stat().st_size
    parameters = {"weight": 0.5, "density": 0.5}
    config = {
        "merge_method": "ties",
        "dtype": "bfloat16",
        "base_model": str(base.parent),
        "models": [{"model": str(p.parent), "parameters": parameters} for p in (a, b)],
    }
    options = ties_options(base)
    return Case(
        f"TIES: a base and two fine-tunes of {size / 1e9:.2f} GB, bfloat16, density 0.5",
        [
            *limits(setup, inputs),
            *soups(setup, [a, b], options, claims=TIES_CLAIMS, fast_claims=TIES_FAST),
            *mergekit(setup, "mergekit-yaml", config, size, ["mergekit"]),
        ],
        inputs,
    )


def method(name: str, setup: Setup) -> Case:
    """A method that mergekit has too, on models of a quarter of the size."""
    has_base, of_model, of_merge = METHODS[name]
    base, a, b = setup.data("llama", 0, 1, 2, scale=0.25)
    size = a.stat().st_size
    pairs = name in ("arcee_fusion", "nearswap")  # the base is the first of two models
    models = [b] if pairs else [a, b]
    config: dict[str, object] = {
        "merge_method": name, "dtype": "bfloat16", "parameters": of_merge,
        "models": [{"model": str(p.parent), "parameters": of_model} for p in models],
    }  # fmt: skip
    options = ["--method", name]
    for key, value in {**of_model, **of_merge}.items():
        options += ["--set", f"{key}={value}"]
    if has_base:
        config["base_model"] = str((a if pairs else base).parent)
        options += [] if pairs else ["--base", str(base)]
    claims, fast_claims = (
        (Claim("x mergekit", low=4), Claim("RSS MB", high=megabytes)) for megabytes in (120, 200)
    )
    read = [a, b] if pairs or not has_base else [base, a, b]
    return Case(
        f"{name}: models of {size / 1e9:.2f} GB, bfloat16",
        [
            *limits(setup, read, kinds=[CACHED]),
            *soups(setup, [a, b], options, claims=claims, fast_claims=fast_claims, kinds=[CACHED]),
            *mergekit(setup, "mergekit-yaml", config, size, ["mergekit"]),
        ],
        read,
    )


def lora(setup: Setup) -> Case:
    (base,), (adapter,) = setup.data("llama", 0), setup.data("lora", 0)
    size = base.stat().st_size
    claims = (Claim("x limit", high=2), Claim("RSS MB", high=120))
    return Case(
        f"LoRA: an adapter of rank 16 folded into a model of {size / 1e9:.2f} GB, bfloat16",
        [
            *limits(setup, [base]),
            *soups(setup, [base], ["--lora", str(adapter)], claims=claims, fast_claims=claims),
        ],
        [base, adapter],
    )


def gan(setup: Setup) -> Case:
    a, b = inputs = setup.data("gan", 0, 1)
    size = a.stat().st_size
    config = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in (a, b)],
    }
    claims = (Claim("x limit", high=1.5),)
    return Case(
        f"GAN: the mean of two CycleGANs (four nets) of {size / 1e6:.0f} MB, float32",
        [
            *limits(setup, inputs),
            *soups(setup, inputs, LINEAR, claims=claims, fast_claims=claims),
            *scripts(setup, inputs),
            *mergekit(setup, "mergekit-pytorch", config, size, ["mergekit"]),
            mecha(setup, "weighted_sum", 0.5, "float32", inputs),
        ],
        inputs,
    )


def double(setup: Setup) -> Case:
    rows: list[Row] = []
    every: list[Path] = []
    first_note = ""
    for scale in (1, 2):
        inputs = setup.data("llama", 1, 2, scale=scale)
        note = f", {inputs[0].stat().st_size / 1e9:.2f} GB"
        claims = (
            (Claim("wall x half", 1.7, 2.3), Claim("RSS x half", 0.9, 1.1)) if scale > 1 else ()
        )
        new = limits(setup, inputs, kinds=[CACHED], note=note)
        new += soups(
            setup, inputs, LINEAR, claims=claims, fast_claims=claims, kinds=[CACHED], note=note
        )
        if scale > 1:
            new = [replace(row, half=row.name.replace(note, first_note)) for row in new]
        first_note = note
        rows += new
        every += inputs
    return Case("Twice the bytes: the mean of two models", rows, every)


def single(setup: Setup) -> Case:
    base, a, b = inputs = setup.data("single", 0, 1, 2)
    rows: list[Row] = []
    for note, reads, options, claims in (
        (", slerp", [a, b], SLERP, SLERP_CLAIMS),
        (", ties", inputs, ties_options(base), TIES_CLAIMS),
    ):
        rows += limits(setup, reads, kinds=[CACHED], note=note)
        rows += soups(
            setup, [a, b], options, claims=claims, fast_claims=claims, kinds=[CACHED], note=note
        )
    size = a.stat().st_size
    return Case(f"Models that are one single tensor of {size / 1e9:.2f} GB", rows, inputs)


def half(setup: Setup) -> Case:
    """So little that the start of Python counts."""
    inputs = setup.data("llama", 1, 2, scale=0.25)
    size = inputs[0].stat().st_size
    claims = (Claim("s over 1.3 x limit", high=0.15),)
    return Case(
        f"Half a gigabyte: the mean of two models of {size / 1e9:.2f} GB, bfloat16",
        [
            *limits(setup, inputs),
            *soups(setup, inputs, LINEAR, claims=claims, fast_claims=claims),
        ],
        inputs,
        repeat=3,
    )


def ema(setup: Setup) -> Case:
    """Snapshots are copies, as the processor's cache would hold what is read of one file again."""
    members = setup.data("llama", 1, 2, scale=0.0625)
    size = members[0].stat().st_size
    folder = setup.directory / f"snapshots-{setup.scale:g}"
    folder.mkdir(exist_ok=True)
    inputs = [folder / f"step-{number}.safetensors" for number in range(SNAPSHOTS)]
    for number, path in enumerate(inputs):
        if not path.exists():
            shutil.copyfile(members[number % len(members)], path)
    average = ("-m", "modelsoup", "average", *map(str, inputs), "--ema", "0.999")
    claims = (Claim("x limit", high=1.2), Claim("RSS MB", high=2 * size / 1e6))
    rows = [
        Row(
            name,
            (str(python), *average, "-o", setup.output, "-q") if python else (),
            environment,
            warm_up=(str(python), "-m", "modelsoup", "--help") if python else (),
            writes=size,
            limit="reading",
            claims=claims,
        )
        for name, python, environment in (
            ("modelsoup, numpy", setup.python, {"MODELSOUP_FAST": "0"}),
            ("modelsoup, numba", setup.fast, {}),
        )
    ]
    reading = Row("reading", (setup.python, "-c", READING, *map(str, inputs)))
    return Case(
        f"EMA of {SNAPSHOTS} snapshots of {size / 1e9:.2f} GB, bfloat16",
        [reading, *rows],
        members,
    )


def many(setup: Setup) -> Case:
    """So many tensors that what is done for each counts, and not what is in them."""
    base, *models = setup.data("many", 0, 1, 2)
    size = base.stat().st_size
    merge = ("-m", "modelsoup", "merge", *map(str, models), "-o", setup.output, "-q", "--no-fsync")
    asked: dict[str, tuple[list[str], float, int]] = {"--dry-run": (["--dry-run"], 3, 0)}
    for name, options in (
        ("linear", []),
        ("slerp", SLERP),
        ("nearswap", ["--method", "nearswap", "--set", "t=0.001"]),
        ("ties", ties_options(base)),
    ):
        asked[name] = (options, 10, size)
    return Case(
        f"Two models of {round(100_000 * setup.scale):,} small tensors",
        [
            Row(
                name,
                (setup.python, *merge, *options),
                {"MODELSOUP_FAST": "0"},
                warm_up=(setup.python, "-m", "modelsoup", "--help"),
                writes=writes,
                claims=(Claim("wall s", high=most),),
            )
            for name, (options, most, writes) in asked.items()
        ],
        [base, *models],
    )


def startup(setup: Setup) -> Case:
    """Only the interpreter's own start bounds these; it is shown beside them."""
    python = setup.python
    return Case(
        "Start of python -m modelsoup",
        [
            Row("python -c pass", (python, "-c", "pass")),
            Row("import numpy", (python, "-c", "import numpy")),
            # Fails if torch, rich or networkx came with it.
            Row("import modelsoup", (python, "-c", LIGHT_IMPORT)),
            Row(
                "soup --help",
                (python, "-m", "modelsoup", "--help"),
                claims=(Claim("wall s", high=0.3),),
            ),
        ],
        repeat=5,
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "linear": linear,
    "slerp": slerp,
    "ties": ties,
    "lora": lora,
    "gan": gan,
    "half": half,
    "ema": ema,
    "double": double,
    "single": single,
    "many": many,
    "startup": startup,
    **{name: partial(method, name) for name in METHODS},
}


# ------------------------------------------------------------------------------------- tables


def ratio(
    result: Result, references: Sequence[Result], of: Callable[[Sample], float]
) -> float | None:
    """Median over rounds of a sample by the best of the references' samples of that round."""
    complete = [reference for reference in references if not reference.error]
    if result.error or not complete:
        return None
    rounds = zip(result.samples, *(reference.samples for reference in complete), strict=True)
    return statistics.median(of(mine) / min(map(of, others)) for mine, *others in rounds)


def over_limit(result: Result, limit: Sequence[Result]) -> float | None:
    """Median over rounds of the seconds by which a row took longer than 1.3 times its limit."""
    if result.error or not limit or limit[0].error:
        return None
    rounds = zip(result.samples, limit[0].samples, strict=True)
    return statistics.median(mine.wall - 1.3 * bound.wall for mine, bound in rounds)


def quantities(result: Result, results: Sequence[Result]) -> dict[str, float | None]:
    """What claims are made about, by name; None where it could not be measured."""
    if result.error:
        return {}

    def wall(sample: Sample) -> float:
        return sample.wall

    row = result.row
    limit = [other for other in results if other.row.name == row.limit]
    half = [other for other in results if other.row.name == row.half]
    peers = [other for other in results if other.row.name.startswith("mergekit")]
    to_mergekit = ratio(result, peers, wall) if row.limit == "limit" else None
    peak, half_peak = (
        max((sample.rss for one in group for sample in one.samples), default=math.nan)
        for group in ([result], half)
    )
    return {
        "wall s": statistics.median(map(wall, result.samples)),
        "RSS MB": peak / 1e6,
        "x limit": ratio(result, limit, wall),
        "s over 1.3 x limit": over_limit(result, limit),
        "CPU x limit": ratio(result, limit, lambda sample: sample.cpu),
        "x mergekit": 1 / to_mergekit if to_mergekit else None,
        "wall x half": ratio(result, half, wall),
        "RSS x half": peak / half_peak if half_peak > 0 else None,
    }


def table(results: Sequence[Result]) -> list[list[str]]:
    """A line for each row under a line of headings, without the columns that say nothing."""
    ratios = ("x limit", "CPU x limit", "x mergekit", "wall x half", "RSS x half")
    lines = [["", "wall s", "CPU s", "RSS MB", "anon MB", *ratios, "target"]]
    for result in results:
        row, samples = result.row, result.samples
        if result.error:
            lines.append([row.name, *["-"] * 9, result.error])
            continue
        found = quantities(result, results)
        anonymous = [sample.anonymous for sample in samples if sample.anonymous is not None]
        lines.append(
            [
                row.name,
                spread([sample.wall for sample in samples]),
                spread([sample.cpu for sample in samples]),
                f"{found['RSS MB']:.0f}",
                f"{max(anonymous) / 1e6:.0f}" if anonymous else "-",
                *("-" if found[name] is None else f"{found[name]:.2f}" for name in ratios),
                "; ".join(claim.verdict(found[claim.quantity]) for claim in row.claims) or "-",
            ]
        )
    told = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    return [list(line) for line in zip(*told, strict=True)]


def spread(values: Sequence[float]) -> str:
    """The median and, where there are several values, the least and the largest."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}-{max(values):.2f}]"


def render(lines: Sequence[Sequence[str]]) -> str:
    """A table that reads as text and as markdown."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def versions(python: str | None, *packages: str) -> dict[str, str]:
    """Versions of an interpreter and of those packages that it has."""
    if not python:
        return {}
    try:
        done = subprocess.run(
            [python, "-c", VERSIONS, *packages], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{python}: this is not a Python interpreter that runs")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def program(name: str) -> str:
    """The absolute path of a program, since runs have a working folder of their own."""
    found = shutil.which(name)
    if not found:
        raise argparse.ArgumentTypeError(f"no such program: {name}")
    # Not resolved: an environment's interpreter is a link, and known by where the link is.
    return os.path.abspath(found)


def machine() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{processor}, {os.cpu_count()} cores",
        "memory": f"{memory / 1e9:.1f} GB",
        "system": platform.platform(terse=True),
        "date": date.today().isoformat(),
    }


NOTES = """Medians of the rounds [least-largest]; memory is the largest of all rounds. RSS counts
pages of mapped files, anon does not. *limit* only reads the inputs and writes as many bytes; ratios
are medians of the ratios within a round; *x mergekit* is how many times faster than mergekit, the
faster of its settings. Start-up is included; inputs are in the page cache. What is below 25 MB of
RSS is the measuring program's own."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    every = list(CASES)
    add("--cases", nargs="+", choices=every, default=every, metavar="CASE", help=", ".join(every))
    add("--rounds", type=int, default=3, help="runs of each row (default: 3)")
    add("--scale", type=float, default=1, help="size of the models; 0.05 for a quick look")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()) / "modelsoup-benchmark")
    add("--python", type=program, default=sys.executable, help="with modelsoup (default: this)")
    add("--fast-python", type=program, help="with modelsoup[fast] (default: --python, if so)")
    add("--torch-python", type=program, help="with torch and safetensors")
    add("--mergekit", type=Path, help="the bin folder of an environment with mergekit")
    add("--mecha-python", type=program, help="with sd-mecha")
    add("--markdown", type=Path, metavar="FILE", help="write a page with machine and tables")
    add("--json", type=Path, metavar="FILE", help="write every single measurement")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    own = ("modelsoup", "numpy", "ml_dtypes", "numba")
    about = {"modelsoup": versions(options.python, *own)}
    fast = options.fast_python or (options.python if "numba" in about["modelsoup"] else None)
    about["modelsoup[fast]"] = versions(fast, *own)
    if fast and "numba" not in about["modelsoup[fast]"]:
        parser.error(f"--fast-python: {fast} has no numba")
    about["torch"] = versions(options.torch_python, "torch", "safetensors")
    about["mergekit"] = versions(
        options.mergekit and str(options.mergekit / "python"), "mergekit", "torch", "transformers"
    )
    about["sd-mecha"] = versions(options.mecha_python, "sd-mecha", "torch")
    facts = machine() | {
        name: ", ".join(f"{package} {version}" for package, version in found.items())
        for name, found in about.items()
        if found
    }
    facts["command"] = shlex.join(["python", *sys.argv])
    head = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    print(head)

    directory = options.dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        directory,
        options.scale,
        options.python,
        fast,
        options.torch_python,
        options.mecha_python,
        str(options.mergekit.absolute()) if options.mergekit else None,
    )
    page = ["# Measurements", f"{head}\n\n{NOTES}"]
    raw = []
    for name in options.cases:
        print(f"\n{name}", file=sys.stderr)
        case = CASES[name](setup)
        before, _, _ = os.getloadavg()
        results = measure(case, options.rounds, setup.work)
        after, _, _ = os.getloadavg()
        # One program alone makes for a load of about one; much more, and others were at work.
        load = f"Load average: {before:.1f} before, {after:.1f} after."
        lines = render(table(results))
        print(f"\n{case.title}\n{lines}\n{load}", flush=True)
        page += [f"## {case.title}", lines, load]
        rows = [asdict(result) for result in results]
        raw.append({"case": name, "title": case.title, "load": [before, after], "rows": rows})
    if options.markdown:
        options.markdown.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    if options.json:
        content = {"machine": facts, "scale": options.scale, "cases": raw}
        options.json.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
