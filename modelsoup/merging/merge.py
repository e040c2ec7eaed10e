"""`merge`: open, plan, check, carry out, and put the result in its place."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from ..errors import (
    LISTED,
    MismatchError,
    NonfiniteError,
    OutputError,
    ParameterError,
    counted,
    listed,
    must_be_several,
    nearest,
    option,
)
from ..files.checkpoint import (
    KNOWN_STEMS,
    SUFFIX,
    Checkpoint,
    Part,
    StrPath,
    open_checkpoint,
    parts_listed,
)
from ..files.companions import (
    Stack,
    adapt_configs,
    companions,
    lost_tokens,
    missing_layers,
)
from ..files.dtypes import DTYPES
from ..files.names import layer_of
from ..files.placing import LINEAGE_KEY, OccupiedError, check_apart, check_free, check_place
from ..files.tokenizer import is_tokenizer, put_tokenizer
from ..files.writer import (
    CheckpointWriter,
    OutputFile,
    OutputTensor,
    header_bytes,
    layout_parts,
    parse_size,
)
from .engine import SLICE, Progress, Stream
from .folding import Lora, with_adapters
from .inputs import Inputs
from .lineage import Digests, record
from .nonfinite import nonfinite_sentence
from .plan import MergePlan, Notice, Unmade
from .planning import plan_merge
from .recipe import UNION, Recipe, RecipeFields
from .related import unrelated
from .renames import parse_model
from .rules import covering
from .threads import check_workers

DEFAULT_OUTPUT = "soup.safetensors"

# Metadata that holds a digest of the model: of the data section, with what stands before it.
_DATA_DIGESTS = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
_DIGEST = re.compile(r"hash|digest|checksum|md5|sha-?\d|crc-?\d|blake|xxh", re.IGNORECASE)
_TRAINING = "ss_"  # what a training began with, which is as true as ever


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the file or folder that was written; None after a dry run.
        plan: what was done.
        notices: what the user should know: the plan's, and what only values could tell.
        bytes_read: from the inputs, extra passes and digests included.
        bytes_written: headers included.
        digests: of the files of each checkpoint that was read: of a model that was merged in the
            same pass, those of its own models.
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
    lora: Lora | None = None,
    aux: Mapping[str, Sequence[StrPath | Checkpoint]] | None = None,
    shard_size: int | str | None = None,
    workers: int | None = None,
    force: bool = False,
    strict: bool = False,
    sha256: bool = False,
    fsync: bool = True,
    dry_run: bool = False,
    model_card: bool | str = False,
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
        lora: low-rank adapters that are applied to the one model, with weights or without: a
            mapping from paths to weights, or a list of paths, of which each has the weight 1. The
            method is one over task vectors, and `task_arithmetic` if it is not given.
        aux: what some methods take beside the models: name → one checkpoint a model.
        shard_size: bytes, or `5GB`: divide a folder's weights into shards of at most this size.
        workers: threads; None takes the number of cores, at most 8.
        force: replace an existing output.
        strict: make an error of every warning.
        sha256: record SHA-256 digests of the inputs too.
        fsync: flush to the disk before the output appears.
        dry_run: check everything that headers can show, and write nothing.
        model_card: write a model card, README.md, into a folder; a text is the configuration that
            it shows, in place of the recipe.
        progress: called, from any thread, with the number of bytes that were read or written since
            the last call and the number expected in all.
        **fields: of `Recipe`: `method`, `beta`, `weights`, `parameters`, `layers`, `rest`,
            `groups`, `low_level`, `renames`, `slices`, `files_from`, `tokenizer_from`,
            `chat_template`, `dtype`, `seed`, `on_integer`, `allow_nonfinite`.

    Raises:
        SoupError: anything that the user can put right; no output is left behind then.
    """
    if recipe is None:
        recipe = _recipe_of(fields)
    elif fields:
        raise ParameterError(f"give a recipe or its fields, not both: {', '.join(fields)}")
    workers = check_workers(workers)
    must_be_several("models", models)
    if not str(output):
        raise OutputError("the output is an empty path")
    output = Path(output)
    opened = [_open(model) for model in models]
    opened_base = None if base is None else _open(base)
    if lora is not None:
        opened, opened_base, recipe = with_adapters(opened, opened_base, recipe, lora)
    beside = {name: [_open(one) for one in given] for name, given in (aux or {}).items()}
    plan = plan_merge(opened, recipe, base=opened_base, aux=beside)
    check_place(output)
    check_apart(output, [path for model in plan.inputs for path in (model.path, *model.files)])
    notices = [*plan.notices, *unrelated(plan)]
    try:
        check_free(output, force=force)
    except OccupiedError as error:
        if not dry_run:
            raise
        notices.append(Notice("output", str(error), (), "note"))
    files = layout_parts(
        [OutputTensor(step.name, step.dtype, step.shape) for step in plan.steps],
        _parts(output, plan),
        shard_size=None if shard_size is None else parse_size(shard_size),
    )
    if shard_size is not None and output.suffix == SUFFIX:
        raise OutputError(
            f"the output {output} is one file, and is not divided into shards: name a folder"
        )
    if output.suffix == SUFFIX and any(file.prefix for file in files):
        raise OutputError(
            f"the output {output} is one file, but there are weights in "
            f"{listed([file.prefix or '.' for file in files])}: name a folder"
        )
    if model_card and output.suffix == SUFFIX:
        raise OutputError(
            f"the output {output} is one file, and a model card goes into a folder: name a folder"
        )
    notices += _of_the_folder(plan, output, files)
    _strict(notices, strict)
    if dry_run:
        return MergeReport(None, plan, tuple(notices))
    return _execute(
        plan, output, files, workers=workers, force=force, sha256=sha256,
        fsync=fsync, progress=progress, notices=notices, card=model_card,
    )  # fmt: skip


def _recipe_of(fields: RecipeFields) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)}
    for name in fields:
        if name not in known:
            raise ParameterError(f"merge() has no option {name!r}{nearest(name, known)}")
    return Recipe(**fields)


def _open(model: StrPath | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _parts(output: Path, plan: MergePlan) -> list[Part]:
    """What the output's files are called: as those of the models."""
    if output.suffix == SUFFIX:
        whole = all(not part.prefix for model in plan.given for part in model.parts)
        if whole:
            return [Part("", output.name.removesuffix(SUFFIX))]
    every = [*plan.given, *([plan.base] if plan.base is not None else [])]
    parts: dict[str, Part] = {}
    for model in every:
        for part in model.parts:
            known = model.is_folder or part.stem in KNOWN_STEMS
            parts.setdefault(part.prefix, part if known else part._replace(stem="model"))
    return list({**parts, "": parts.get("", Part("", "model"))}.values())


def _of_the_folder(plan: MergePlan, output: Path, files: Sequence[OutputFile]) -> list[Notice]:
    """What of the first model's folder goes along, looked at before anything is done."""
    folder = plan.files_from.companions
    if output.suffix == SUFFIX or folder is None:
        return []
    _check_tokenizer(plan)
    for place in (folder, *_parts_from(plan, files).values()):
        for _ in companions(place, without=output):  # for its errors
            pass
    names = [step.name for step in plan.steps]
    before = () if plan.recipe.slices else list(plan.layout.models[0].tensors)
    tokens = () if plan.tokens is None else lost_tokens(folder, plan.tokens.numbers)
    of_tokens = [
        Notice("config", f"{said}, but the output has no such token", ()) for said in tokens
    ]
    return [*_of_the_list_of_parts(plan, folder, files), *of_tokens] + [
        Notice("config", f"{said}, but the output lacks {counted(len(gone), 'layer')} of them: "
               f"{listed(gone)}", tuple(gone))
        for said, gone in missing_layers(folder, before, names, _stacks(plan))
    ]  # fmt: skip


def _tokenizer(plan: MergePlan) -> Path | None:
    """The folder whose tokenizer goes along in place of what else would; None if none does."""
    wanted = plan.recipe.tokenizer_from
    return None if wanted in (None, UNION) else plan.called(wanted).companions


def _check_tokenizer(plan: MergePlan) -> None:
    """Whether the tokenizer that was asked for is there.

    Raises:
        MismatchError: it is not.
    """
    wanted, template = plan.recipe.tokenizer_from, plan.recipe.chat_template
    folder = _tokenizer(plan) or plan.files_from.companions
    if wanted is None and template is None:
        return
    if folder is None or not is_tokenizer(folder):
        model = plan.files_from if wanted in (None, UNION) else plan.called(wanted)
        raise MismatchError(
            f"{model.name} has no tokenizer: {option('tokenizer_from', 'MODEL')} takes another's"
        )


def _of_the_list_of_parts(
    plan: MergePlan, folder: Path, files: Sequence[OutputFile]
) -> Iterator[Notice]:
    """Where the first model's list of its parts, which goes along, is not true of the output."""
    parts = parts_listed(folder)
    if parts is None:
        return
    there = list(dict.fromkeys(file.prefix[:-1] for file in files if file.prefix))
    unlisted = [name for name in there if name not in parts.names]
    were = [part.prefix[:-1] for part in plan.given[0].parts if part.prefix]
    gone = [name for name in were if name not in there]
    for names, what in (
        (unlisted, "does not name {}, so that the weights there are not read: name them in it"),
        (gone, "names {}, of which the output has no weights"),
    ):
        if names:
            said = f"{parts.file} {what.format(listed(names))}"
            yield Notice("config", said, tuple(names))


def _parts_from(plan: MergePlan, files: Sequence[OutputFile]) -> dict[str, Path]:
    """The folders whose other files go along with parts that the first model has not."""
    found: dict[str, Path] = {}
    first, *others = plan.given
    own = {part.prefix for part in first.parts}
    for prefix in {file.prefix for file in files} - own:
        folders = [model.companions for model in others if model.companions is not None]
        folder = next((f / prefix for f in folders if (f / prefix).is_dir()), None)
        of_files = plan.files_from.companions
        is_there = of_files is not None and (of_files / prefix).exists()
        if folder is not None and not is_there:
            found[prefix] = folder
    return found


def _strict(notices: Sequence[Notice], strict: bool) -> None:
    warnings = [notice.message for notice in notices if notice.level == "warning"]
    if strict and warnings:
        raise MismatchError(f"{'; '.join(warnings)} ({option('strict')})")


def _execute(
    plan: MergePlan, output: Path, files: list[OutputFile], *, workers: int, force: bool,
    sha256: bool, fsync: bool, progress: Progress | None, notices: Sequence[Notice] = (),
    slice_elements: int = SLICE, card: bool | str = False,
) -> MergeReport:  # fmt: skip
    """Carry out a plan. `slice_elements` (a multiple of `BLOCK`) is there for the tests."""
    _allow_many_files()
    first = plan.given[0]
    metadata, false = _metadata(first.metadata, len(files))
    told = list(notices or plan.notices)
    if false:
        false.sort()
        what = f"{listed(false)} of the metadata {'was' if len(false) == 1 else 'were'} left out"
        told.append(Notice("metadata", f"{what}: it is no digest of this model", (), "note"))

    def with_lineage(
        digests: Digests | None,
        nonfinite: Callable[[MergePlan], Mapping[str, int]] | None = None,
    ) -> dict[str, str]:
        content = record(plan, digests, sha256=sha256, nonfinite=nonfinite)
        return {**metadata, LINEAGE_KEY: json.dumps(content, separators=(",", ":"))}

    inputs = Inputs(plan.stored, sha256=sha256)
    try:
        stream = Stream(plan, inputs, workers, slice_elements, progress)
        stream.compare_integers()
        copy_from = plan.files_from.companions if output.suffix != SUFFIX else None
        with CheckpointWriter(
            output,
            files,
            with_lineage(None),
            force=force,
            fsync=fsync,
            copy_from=copy_from,
            parts_from=None if copy_from is None else _parts_from(plan, files),
        ) as writer:
            stream.run(writer, files)
            if refused := stream.refused_nonfinite():
                names = sorted({fault.name for fault in refused})  # workers find them in any order
                every = [step.name for step in plan.steps]
                patterns = covering(names, every)
                hinted = patterns if len(patterns) <= 2 * LISTED else ["*"]
                raise NonfiniteError(nonfinite_sentence(refused, hinted))
            digests = inputs.digests()
            metadata.update(_data_digests(writer, files, metadata))
            writer.update_metadata(with_lineage(digests, stream.nonfinite_results))
            if copy_from is not None:
                if plan.recipe.tokenizer_from or plan.recipe.chat_template is not None:
                    added = () if plan.tokens is None else plan.tokens.added
                    put_tokenizer(
                        writer.path(""), _tokenizer(plan), plan.recipe.chat_template, added
                    )
                adapt_configs(
                    writer.path(""), [file.prefix for file in files], _changed_dtypes(plan),
                    quantised=plan.has_codes, stacks=_stacks(plan),
                    tokens=None if plan.tokens is None else plan.tokens.numbers,
                )  # fmt: skip
            if card:
                from .card import CARD, model_card  # with YAML, which a merge seldom needs

                text = model_card(plan, output.name, card if isinstance(card, str) else None)
                (writer.path("") / CARD).write_text(text, "utf-8")
            writer.commit()
    finally:
        inputs.close()
    if stream.nonfinite:
        found = tuple(sorted({fault.name for fault in stream.nonfinite}))
        told.append(Notice("nonfinite", nonfinite_sentence(stream.nonfinite), found, "note"))
    final = with_lineage(digests, stream.nonfinite_results)
    return MergeReport(
        output, plan, tuple(told), stream.bytes_read + inputs.extra_bytes,
        sum(len(header_bytes(f, final)) for f in files) + plan.bytes_written,
        digests,
        sha256,
    )  # fmt: skip


def _metadata(of_first: Mapping[str, str], files: int) -> tuple[dict[str, str], list[str]]:
    """What of the first model's metadata is true of the output too, and which of it is not.

    Digests of one model are none of another: they are computed anew where that is known how, of a
    checkpoint that is one file, and else left out.
    """
    kept, false = {}, []
    for key, text in of_first.items():
        if key in _DATA_DIGESTS and files == 1:
            kept[key] = _DATA_DIGESTS[key] + "0" * 64
        elif _DIGEST.search(key) and not key.startswith(_TRAINING):
            false.append(key)
        elif key != LINEAGE_KEY:
            kept[key] = text
    return kept, false


def _data_digests(
    writer: CheckpointWriter, files: Sequence[OutputFile], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The digests that the metadata is to have, of what was written."""
    wanted = [key for key in _DATA_DIGESTS if key in metadata]
    if not wanted:
        return {}
    import hashlib  # loads OpenSSL, which a merge seldom needs

    digest = hashlib.sha256()
    for piece in writer.data(files[0].name):
        digest.update(piece)
    return {key: _DATA_DIGESTS[key] + digest.hexdigest() for key in wanted}


def _changed_dtypes(plan: MergePlan) -> tuple[str, ...]:
    """The dtypes that the config of the output was to name on the way, and must name at last."""
    model = plan.files_from
    before = model.dtypes if isinstance(model, Unmade) else ()
    if plan.recipe.dtype is not None:
        return (*before, str(plan.recipe.dtype))
    if model is plan.given[0]:
        return before
    dtypes = Counter(step.dtype for step in plan.steps if DTYPES[step.dtype].kind == "float")
    return (*before, *(name for name, _ in dtypes.most_common(1)))


def _stacks(plan: MergePlan) -> dict[str, Stack]:
    """The numbered layers of the output that are not those of the first model."""
    if not (plan.recipe.slices or plan.dropped):
        return {}
    first, layout = plan.layout.models[0], plan.layout
    found: dict[str, dict[int, tuple[Path | None, int]]] = {}
    for step in plan.steps:
        if (layer := layer_of(step.name)) and step.name in first.tensors:
            model, info = layout.origin(0, first.tensors[step.name])
            own = layer_of(info.name)
            number = layer.number if own is None else own.number
            found.setdefault(layer.stack, {})[layer.number] = plan.models[model].companions, number
    of_files = parse_model("files_from", plan.recipe.files_from or "first")
    before = dict(layout.depths.get(of_files, {}))
    if not before:
        for layer in filter(None, map(layer_of, first.tensors)):
            before[layer.stack] = max(before.get(layer.stack, 0), layer.number + 1)
    return {
        stack: Stack(before[stack], tuple(layers[n] for n in range(len(layers))))
        for stack, layers in found.items()
        # Layers with a gap between them are loaded by nobody, whatever a config says.
        if stack in before and max(layers) + 1 == len(layers)
    }


def _allow_many_files() -> None:
    """Let shards of many models be open at once: the default limit is low, the hard one is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
