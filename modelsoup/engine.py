"""`merge`: open, plan, check, carry out, and put the result in its place."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from .checkpoint import SUFFIX, Checkpoint, StrPath, open_checkpoint
from .dtypes import numpy_dtype
from .errors import (
    MismatchError,
    NonfiniteError,
    OutputError,
    ParameterError,
    listed,
    nearest,
    option,
)
from .lineage import Digests, record
from .recipe import MergePlan, Notice, Recipe, RecipeFields, plan_merge
from .stream import SLICE, Inputs, Nonfinite, Progress, Stream, default_workers
from .unmade import Unmade
from .writer import (
    LINEAGE_KEY,
    CheckpointWriter,
    OutputFile,
    OutputTensor,
    check_output,
    header_bytes,
    layout,
    parse_size,
)

DEFAULT_OUTPUT = "soup.safetensors"
_DIFFUSION = "diffusion_pytorch_model"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the file or folder that was written; None after a dry run.
        plan: what was done.
        notices: what the user should know: the plan's, and what only values could tell.
        bytes_read: from the inputs, extra passes and digests included.
        bytes_written: headers included.
        digests: of each model's files, by model index (`rules.BASE` for the base); of a model that
            was merged in the same pass, those of its own models.
        sha256: whether SHA-256 digests are among them.
    """

    output: Path | None
    plan: MergePlan
    notices: tuple[Notice, ...]
    bytes_read: int = 0
    bytes_written: int = 0
    digests: Digests = field(default_factory=dict)
    sha256: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data: what `soup merge --json` prints."""
        plan = self.plan
        return {
            "output": None if self.output is None else str(self.output),
            "tensors": len(plan.steps),
            "parameters": sum(step.elements for step in plan.steps),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "planned": {
                "bytes_read": plan.bytes_read,
                "bytes_streamed": plan.bytes_streamed,
                "bytes_written": plan.bytes_written,
            },
            "rules": [dataclasses.asdict(taken) for taken in plan.rule_counts()],
            "dropped": list(plan.dropped),
            "added": list(plan.added),
            "frozen": list(plan.frozen),
            "notices": [dataclasses.asdict(notice) for notice in self.notices],
            "lineage": record(plan, self.digests or None, sha256=self.sha256),
        }


def merge(
    models: Sequence[StrPath | Checkpoint],
    output: StrPath = DEFAULT_OUTPUT,
    recipe: Recipe | None = None,
    *,
    base: StrPath | Checkpoint | None = None,
    shard_size: int | str | None = None,
    workers: int | None = None,
    force: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
    sha256: bool = False,
    fsync: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    **fields: Unpack[RecipeFields],
) -> MergeReport:
    """Merge checkpoints into one.

    >>> modelsoup.merge(["a.safetensors", "b.safetensors"], beta=0.5, layers=["disc.*"])

    Args:
        models: paths, or open checkpoints; the first gives names, order, dtypes and metadata.
        output: a path that ends in `.safetensors` makes a file, any other a model folder, into
            which the first model's config and tokenizer are copied.
        recipe: what to do; or give its fields as keywords.
        base: the base model of task-vector methods.
        shard_size: bytes, or `5GB`: divide a folder's weights into shards of at most this size.
        workers: threads; None takes the number of cores, at most 8.
        force: replace an existing output.
        strict: make an error of every notice.
        allow_nonfinite: let NaN, infinity and a zero sum of weights pass.
        sha256: record SHA-256 digests of the inputs too.
        fsync: flush to the disk before the output appears.
        dry_run: check everything that headers can show, and write nothing.
        progress: called, from any thread, with the number of bytes that were read or written since
            the last call and the number expected in all.
        **fields: of `Recipe`: `method`, `beta`, `weights`, `parameters`, `layers`, `rest`,
            `groups`, `low_level`, `dtype`, `seed`, `on_integer`.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    if recipe is None:
        recipe = _recipe_of(fields)
    elif fields:
        raise ParameterError(f"give a recipe or its fields, not both: {', '.join(fields)}")
    if workers is not None and workers < 1:
        raise ParameterError(f"workers is {workers}, but must be at least 1")
    output = Path(output)
    opened = [_open(model) for model in models]
    opened_base = None if base is None else _open(base)
    plan = plan_merge(opened, recipe, base=opened_base, allow_nonfinite=allow_nonfinite)
    _refuse_inputs(output, [*opened, *([opened_base] if opened_base else [])])
    check_output(output, force=force)
    files = layout(
        (OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps),
        file_name=_weights_name(output, plan.models[0]),
        shard_size=None if shard_size is None else parse_size(shard_size),
    )
    if len(files) > 1 and output.suffix == SUFFIX:
        raise OutputError(
            f"the output {output} is one file, but shards of that size would be {len(files)}: "
            f"name a folder"
        )
    _strict(plan.notices, strict)
    if dry_run:
        return MergeReport(None, plan, plan.notices)
    return _execute(
        plan, output, files, workers=workers or default_workers(), force=force,
        allow_nonfinite=allow_nonfinite, sha256=sha256, fsync=fsync, progress=progress,
    )  # fmt: skip


def _recipe_of(fields: RecipeFields) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)}
    for name in fields:
        if name not in known:
            raise ParameterError(f"merge() has no option {name!r}{nearest(name, known)}")
    return Recipe(**fields)


def _open(model: StrPath | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _refuse_inputs(output: Path, inputs: Sequence[Checkpoint]) -> None:
    for model in inputs:
        for path in (model.path, *model.files):
            if output.exists() and path.exists() and output.samefile(path):
                raise OutputError(f"the output {output} is one of the inputs")
            if output.is_dir() and path.resolve().is_relative_to(output.resolve()):
                raise OutputError(f"the output {output} holds the input {path}")


def _weights_name(output: Path, first: Checkpoint) -> str:
    """A file's own name; in a folder, the name that the first model's weights have there."""
    if output.suffix == SUFFIX:
        return output.name
    while isinstance(first, Unmade):
        first = first.plan.models[0]
    diffusion = any(file.name.startswith(_DIFFUSION) for file in first.files)
    return f"{_DIFFUSION if diffusion else 'model'}{SUFFIX}"


def _strict(notices: Sequence[Notice], strict: bool) -> None:
    warnings = [notice.message for notice in notices if notice.level == "warning"]
    if strict and warnings:
        raise MismatchError(f"{'; '.join(warnings)} ({option('strict')})")


def _execute(
    plan: MergePlan, output: Path, files: list[OutputFile], *, workers: int, force: bool,
    allow_nonfinite: bool, sha256: bool, fsync: bool, progress: Progress | None,
    slice_elements: int = SLICE,
) -> MergeReport:  # fmt: skip
    """Carry out a plan. `slice_elements` (a multiple of `BLOCK`) is there for the tests."""
    _allow_many_files()
    metadata = {k: v for k, v in plan.models[0].metadata.items() if k != LINEAGE_KEY}
    first = plan.models[0]

    def with_lineage(digests: Digests | None) -> dict[str, str]:
        content = record(plan, digests, sha256=sha256)
        return {**metadata, LINEAGE_KEY: json.dumps(content, separators=(",", ":"))}

    inputs = Inputs(plan, sha256=sha256)
    try:
        stream = Stream(plan, inputs, workers, slice_elements, progress)
        stream.compare_integers()
        copy_from = first.companions if output.suffix != SUFFIX else None
        with CheckpointWriter(
            output, files, with_lineage(None), force=force, fsync=fsync, copy_from=copy_from
        ) as writer:
            stream.run(writer, files)
            if stream.nonfinite and not allow_nonfinite:
                raise NonfiniteError(_nonfinite_sentence(stream.nonfinite))
            digests = inputs.digests()
            writer.update_metadata(with_lineage(digests))
            dtype = plan.recipe.dtype or (first.dtype if isinstance(first, Unmade) else None)
            if copy_from is not None and dtype is not None:
                _update_config(writer.path("config.json"), dtype)
            writer.commit()
    finally:
        inputs.close()
    notices = list(plan.notices)
    if stream.nonfinite:
        names = tuple(dict.fromkeys(fault.name for fault in stream.nonfinite))
        notices.append(Notice("nonfinite", _nonfinite_sentence(stream.nonfinite), names))
    return MergeReport(
        output, plan, tuple(notices), stream.bytes_read + inputs.extra_bytes,
        sum(len(header_bytes(f, with_lineage(digests))) for f in files) + plan.bytes_written,
        digests,
        sha256,
    )  # fmt: skip


def _allow_many_files() -> None:
    """Let shards of many models be open at once: the default limit is low, the hard one is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _update_config(config: Path, dtype: str) -> None:
    """Let a model folder's config name the dtype that its weights now have."""
    if not config.is_file():
        return
    try:
        content = json.loads(config.read_text("utf-8"))
    except ValueError:
        return  # not transformers' config; it was copied as it is
    keys = [key for key in ("torch_dtype", "dtype") if key in content]
    if keys:
        content.update(dict.fromkeys(keys, numpy_dtype(dtype).name))
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _nonfinite_sentence(faults: Sequence[Nonfinite]) -> str:
    """Which tensors, where and how many elements, the first few by name."""
    totals: dict[tuple[str, str], int] = {}
    for fault in faults:
        key = (fault.name, fault.where)
        totals[key] = totals.get(key, 0) + fault.count
    tensors = len({name for name, _ in totals})
    said = [f"{name} ({count} in {where})" for (name, where), count in sorted(totals.items())]
    return (
        f"NaN or infinity in {tensors} tensors: {listed(said)} (--allow-nonfinite lets them pass)"
    )
