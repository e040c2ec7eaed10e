"""`soup merge`: its options, the files that may have them, and what of them makes the recipe."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import ParameterError
from .cli_shared import (
    GivenPath,
    dry_run_option,
    force_option,
    json_option,
    on_integer_option,
    progress_shown,
    quiet_option,
    say,
    settings_given,
    tell_merge,
    workers_option,
)


@click.command(no_args_is_help=True)
@click.argument("models", nargs=-1, metavar="A B [C …]", type=GivenPath())
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=GivenPath(),
    help="A .safetensors file; or a folder, where config and tokenizer come along.  "
    "[default: soup.safetensors]",
)
@click.option("--method", metavar="NAME", help="See `soup methods`.  [default: linear]")
@click.option(
    "--beta",
    type=float,
    metavar="β",
    help="The first of two models' share, from 0 to 1.  [default: equal weights]",
)
@click.option("--weights", metavar="W,W,…", help="One weight a model.")
@click.option(
    "--base", metavar="BASE", type=GivenPath(), help="The base model of task-vector methods."
)
@click.option(
    "--lora",
    multiple=True,
    metavar="ADAPTER[=W]",
    help="Apply a low-rank adapter to the one model; again for more.  [default: W is 1]",
)
@click.option(
    "--aux",
    multiple=True,
    metavar="NAME=A,B",
    help="What a method takes beside the models, a checkpoint for each: fisher=a.f,b.f.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the method; one number, or one a model: density=0.5,0.3.",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="PATTERN[=WHAT]",
    help="A layer rule: 'disc.*', 're:G_.*', 'G_*=0.3', 'head.*=drop', 'bn.*=second'. "
    "The first that matches decides.",
)
@click.option(
    "--rest",
    metavar="WHAT",
    help="Tensors that no rule matches: merge, first, second or base (kept from that model), "
    "drop, error.  [default: merge if all rules only keep or drop, else first]",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=PATTERN",
    help="Define 'group:NAME' for rules; given again, it adds a pattern.",
)
@click.option(
    "--low-level",
    multiple=True,
    metavar="FRACTION",
    help="The depth that the preset low-level takes of each subnetwork: 0.3, or 'D_*=0.6'.",
)
@click.option(
    "--rename",
    "renames",
    multiple=True,
    metavar="PATTERN=NEW",
    help="Have tensors of a model go by another name: 'module.*=*', 'second:net.*=model.*'.",
)
@click.option(
    "--strip-prefix",
    "prefixes",
    multiple=True,
    metavar="PREFIX",
    help="Take this off the names: 'module.', '_orig_mod.'; --rename 'module.*=*' does the same.",
)
@click.option(
    "--rename-map",
    metavar="FILE",
    type=GivenPath(),
    help="A YAML or JSON file with renames: a mapping from patterns to new names.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    metavar="MODEL[START:STOP]",
    help="Stack layers anew: '1[0:16]' and then '2[8:24]'; '1[0:8]+2[0:8]' merges those of two.",
)
@click.option(
    "--files-from",
    metavar="MODEL",
    help="Whose config and other files go along into a folder: first, second, 3, base.  "
    "[default: first]",
)
@click.option(
    "--tokenizer-from",
    metavar="MODEL|union",
    help="Whose tokenizer does, or the tokens of all; embeddings are put in its order.  "
    "[default: as --files-from]",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="Stored dtype of float tensors: f32, f16, bf16, ….  [default: the first model's]",
)
@on_integer_option
@click.option("--seed", type=int, help="Seeds the methods that drop at random.  [default: 0]")
@click.option(
    "--config",
    metavar="FILE",
    type=GivenPath(),
    help="A YAML file with these options as keys, models and output too; the command line wins. "
    "Or a configuration of mergekit.",
)
@click.option("--shard-size", metavar="SIZE", help="Divide a folder's weights: 5GB, 500MB.")
@workers_option
@dry_run_option
@force_option
@click.option("--strict", is_flag=True, help="Make warnings errors.")
@click.option(
    "--allow-nonfinite",
    multiple=True,
    metavar="PATTERN",
    help="Let NaN and infinity pass in these tensors; '*': in all, and weights that sum to zero.",
)
@click.option(
    "--model-card/--no-model-card",
    default=None,
    help="Write a README.md into a folder: parents, method, configuration.  "
    "[default: for configurations of mergekit]",
)
@click.option("--sha256", is_flag=True, help="Record SHA-256 digests of the inputs too.")
@click.option(
    "--no-fsync",
    is_flag=True,
    help="Do not wait for the disk: quicker, but a power cut may leave a broken file.",
)
@json_option
@quiet_option
@click.option("-v", "--verbose", is_flag=True, help="Say more of what happens.")
def merge(models: tuple[str, ...], **options: Any) -> None:
    """Merge checkpoints into one.

    \b
    soup merge a.safetensors b.safetensors --beta 0.5 --layers 'disc.*'
    """  # noqa: D301
    from ..files.checkpoint import SUFFIX
    from ..merging import merge as engine

    # The objects of a merge live until it ends: looking for cycles among those of 100,000 tensors
    # would take as long as planning them.
    gc.disable()
    click.get_current_context().call_on_close(gc.enable)
    if options["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    talks = not (options["quiet"] or options["as_json"])
    in_file = {} if options["config"] is None else _config(options, models)
    told = {name: in_file.pop(name) for name in _BESIDE_THE_RECIPE if name in in_file}
    of_command = {
        name: options.get(name) for name in _BESIDE_THE_RECIPE if name not in ("lora", "aux")
    }
    told |= {n: value for n, value in of_command.items() if not (value is None or value is False)}
    paths = list(models) or told.pop("models", None)
    told.pop("models", None)
    if options["aux"]:
        told["aux"] = _auxiliary(options["aux"])
    if options["lora"]:
        from ..merging.lora import parse_weighted  # not for merges without one

        told["lora"] = _adapters(map(parse_weighted, options["lora"]))
    if not paths:
        raise click.UsageError("Missing argument 'A B [C …]': the models")
    output = told.pop("output", "soup" if "shard_size" in told else engine.DEFAULT_OUTPUT)
    text = in_file.pop("text", False)  # a configuration of mergekit
    recipe = in_file.pop("recipe", None) or _recipe(options, in_file)
    wants_card = options["model_card"]
    if wants_card is None:
        wants_card = told.pop("model_card", bool(text) and Path(output).suffix != SUFFIX)
    told["model_card"] = (text or True) if wants_card else False
    if options["config"]:
        from ..files.placing import check_apart, check_place

        check_place(Path(output))
        check_apart(Path(output), [Path(options["config"])])
    with progress_shown("merging", shown=talks and not options["dry_run"]) as progress:
        report = engine.merge(
            paths, output, recipe, force=options["force"], fsync=not options["no_fsync"],
            dry_run=options["dry_run"], progress=progress, **told,
        )  # fmt: skip
    tell_merge(report, options)
    if not talks:
        return
    if report.output is not None and report.output.is_file() and Path(paths[0]).is_dir():
        say("note", "config and tokenizer were not copied; with a folder as --output they are")


# Options of `soup merge` that a --config file may have, and the types that they have there.
_BESIDE_THE_RECIPE: dict[str, Any] = {
    "models": list, "output": str, "base": str, "shard_size": (str, int), "workers": int,
    "strict": bool, "sha256": bool, "model_card": bool, "lora": (list, dict),
    "aux": dict,
}  # fmt: skip


def _auxiliary(given: Iterable[str]) -> dict[str, list[str]]:
    """Checkpoints beside the models, by name; what is given again is added."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, paths = text.partition("=")
        if not name or not equals or not all(paths.split(",")):
            raise ParameterError(f"--aux has {text!r}, but must be NAME=A,B: one path a model")
        found.setdefault(name, []).extend(paths.split(","))
    return found


def _adapters(weighted: Iterable[tuple[Path, Any]]) -> dict[Path, float]:
    """Adapters and their weights."""
    found: dict[Path, float] = {}
    for path, weight in weighted:
        if path in found:
            raise ParameterError(f"the adapter {path} is given twice")
        found[path] = weight
    return found


# Options that a merge of mergekit's does not say: what decides its result is in its file.
_BESIDE_MERGEKIT = (
    "config", "output", "shard_size", "workers", "dry_run", "force", "strict", "sha256", "no_fsync",
    "allow_nonfinite", "on_integer", "seed", "as_json", "quiet", "verbose", "model_card",
)  # fmt: skip


def _of_mergekit(options: Mapping[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration of mergekit says, with the recipe that it makes."""
    from dataclasses import replace

    from ..files.yaml_text import read_documents
    from ..trees.mergekit import Folded, merges_of

    path = Path(options["config"])
    source = click.get_current_context().get_parameter_source
    given = [name for name in options if source(name) is not ParameterSource.DEFAULT]
    others = [name for name in given if name not in _BESIDE_MERGEKIT]
    if models or others:
        what = "models are" if models else f"--{others[0].replace('_', '-')} is"
        raise ParameterError(f"{what} given, but {path} is mergekit's and says all of the merge")
    merges, warnings = merges_of(read_documents(path), path.parent)
    folds = any(isinstance(model, Folded) for merge in merges.values() for model in merge.models)
    if len(merges) > 1 or folds:
        output = options["output"] or "OUT"
        what = f"has {len(merges)} merges" if len(merges) > 1 else "folds adapters into models"
        raise ParameterError(
            f"{path} {what}, which {'are' if len(merges) > 1 else 'is'} a tree: soup run "
            f"{shlex.quote(str(path))} -o {shlex.quote(output)}"
        )
    for warning in warnings if not options["quiet"] else ():
        say("warning", warning)
    (merge,) = merges.values()
    named = {n: options[n] for n in ("allow_nonfinite", "on_integer", "seed") if n in given}
    recipe = replace(merge.recipe, **named)
    found = {"models": list(merge.models), "recipe": recipe, "text": path.read_text("utf-8")}
    return found if merge.base is None else {**found, "base": merge.base}


def _config(options: Mapping[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    """What a --config file says; paths in it are relative to it, as in a plan."""
    from ..files.yaml_text import read_yaml
    from ..merging.recipe import plain_keys
    from ..merging.values import truth
    from ..trees.mergekit import speaks_mergekit

    path = options["config"]
    if speaks_mergekit(Path(path)):
        return _of_mergekit(options, models)
    content = plain_keys(read_yaml(Path(path)).content, path)
    for name, kind in _BESIDE_THE_RECIPE.items():
        if name in content and kind is bool:
            content[name] = truth(name, content[name])
        if name in content and not isinstance(content[name], kind):
            raise ParameterError(f"{path} has {content[name]!r} as {name!r}")
    folder = Path(path).parent
    for name in ("output", "base"):
        if name in content:
            content[name] = folder / content[name]
    if "lora" in content:
        given = content["lora"]
        weighted = given.items() if isinstance(given, dict) else ((path, 1.0) for path in given)
        content["lora"] = _adapters((folder / str(path), weight) for path, weight in weighted)
    if "aux" in content:
        content["aux"] = {
            name: [folder / str(one) for one in ([given] if isinstance(given, str) else given)]
            for name, given in content["aux"].items()
        }
    if "models" in content:
        content["models"] = [folder / str(model) for model in content["models"]]
    return content


def _recipe(options: Mapping[str, Any], in_file: dict[str, Any]) -> Any:
    """The recipe of the --config file and, over it, of the command line."""
    from ..merging.recipe import Recipe, recipe_fields
    from ..merging.renames import parse_renames
    from ..merging.rules import parse_layers

    where = options["config"] or "the command line"
    content: dict[str, Any] = dict(recipe_fields(in_file, where, _BESIDE_THE_RECIPE))
    if options["method"] not in (None, content.get("method")):
        content["parameters"] = {}  # another method's
    for name, other in (("beta", "weights"), ("weights", "beta")):
        if options[name] is not None:
            content.pop(other, None)  # the file's, which the command line's replaces
    for name in (
        "method", "beta", "rest", "dtype", "on_integer", "seed", "files_from", "tokenizer_from",
    ):  # fmt: skip
        if options[name] is not None:
            content[name] = options[name]
    if options["weights"] is not None:
        content["weights"] = _numbers("--weights", options["weights"])
    for name in ("low_level", "allow_nonfinite"):
        if options[name]:
            content[name] = list(options[name])
    if options["layers"]:
        own = parse_layers(list(options["layers"]))
        over = {rule.pattern for rule in own if not rule.low_level}
        of_file = parse_layers(content.get("layers", ()))
        content["layers"] = [*own, *(rule for rule in of_file if rule.pattern not in over)]
    if options["groups"]:
        content["groups"] = _groups(options["groups"])
    renames = _renames(options)
    content["renames"] = [*renames, *parse_renames(content.get("renames", ()))]
    if options["slices"]:
        content["slices"] = list(options["slices"])
    for name, value in settings_given(options["settings"]).items():
        parameters = {"parameters": {name.strip(): value}}
        given = recipe_fields({"method": content.get("method"), **parameters}, "the command line")
        content["parameters"] = {**content["parameters"], **given["parameters"]}
    return Recipe(**content)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(f"{option} has {text!r}, but must be numbers with commas") from None


def _groups(definitions: tuple[str, ...]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for definition in definitions:
        name, equals, pattern = definition.partition("=")
        if not equals or not name or not pattern:
            raise ParameterError(f"--group has {definition!r}, but must be NAME=PATTERN")
        groups.setdefault(name, []).append(pattern)
    return groups


def _renames(options: Mapping[str, Any]) -> list[Any]:
    """What the command line says of names, in the order in which it is tried."""
    from ..merging.renames import parse_renames, strip_prefix

    found = [*parse_renames(options["renames"]), *map(strip_prefix, options["prefixes"])]
    if options["rename_map"] is not None:
        from ..files.yaml_text import read_yaml

        content = read_yaml(Path(options["rename_map"])).content
        if not isinstance(content, dict):
            raise ParameterError(
                f"{options['rename_map']} is no mapping from patterns of names to new names"
            )
        found += parse_renames(content)
    return found
