"""The tokenizer of a model folder: which tokens it has, and putting another one in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .reading import read_small

_LARGEST = 200_000_000
_LARGEST_CONFIG = 10_000_000
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER = (
    *_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The files of a tokenizer, of which a model folder has some."""

_PLAIN = {
    "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False,
}  # fmt: skip


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer.

    Attributes:
        ids: token → its number, which is a row of the model's embeddings.
        added: what is said of those that were added to it, as `tokenizer.json` says it.
        free: the number that the next one gets.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    free: int


def vocabulary_of(folder: Path) -> Vocabulary | None:
    """The tokens of a model folder; None where it has no `tokenizer.json` that tells them."""
    try:
        content = json.loads(read_small(folder / "tokenizer.json", _LARGEST))
        own = content["model"]["vocab"]
        if isinstance(own, list):  # Unigram: pairs of a token and its score
            own = {token: number for number, (token, *_) in enumerate(own)}
        added = {token["content"]: token for token in content.get("added_tokens", ())}
        ids = {**own, **{token: said["id"] for token, said in added.items()}}
        if not ids or not all(type(t) is str and type(n) is int and n >= 0 for t, n in ids.items()):
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return Vocabulary(ids, added, max(len(own), 1 + max(ids.values())))


def union(first: Vocabulary, others: Iterable[Vocabulary]) -> tuple[Vocabulary, list[Any]]:
    """A vocabulary with the tokens of others added to it, and how `tokenizer.json` says these."""
    ids = dict(first.ids)
    entries: list[Any] = []
    every = list(others)
    for are_added in (False, True):
        for other in every:
            for token in sorted(other.ids, key=other.ids.__getitem__):
                if token in ids or (token in other.added) != are_added:
                    continue
                number = first.free + len(entries)
                ids[token] = number
                told = {**_PLAIN, **other.added.get(token, {})}
                entries.append({**told, "id": number, "content": token})
    return Vocabulary(ids, first.added, first.free + len(entries)), entries


def is_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def put_tokenizer(
    folder: Path, source: Path | None, template: str | None, added: Sequence[Any] = ()
) -> None:
    """Let a model folder have the tokenizer of another one, more tokens, and a chat template.

    Args:
        folder: the model folder.
        source: the other one; None leaves the tokenizer that there is.
        template: the chat template; None leaves the tokenizer's own.
        added: tokens that its `tokenizer.json` gets, as `union` gives them.
    """
    if source is not None:
        for name in TOKENIZER:
            (folder / name).unlink(missing_ok=True)
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if added:
        path = folder / "tokenizer.json"
        content = json.loads(read_small(path, _LARGEST))
        content["added_tokens"] = [*content.get("added_tokens", ()), *added]
        path.write_text(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n", "utf-8")
    if template is None:
        return
    config = folder / "tokenizer_config.json"
    content = json.loads(read_small(config, _LARGEST_CONFIG)) if config.is_file() else {}
    if isinstance(content, dict):
        content["chat_template"] = template
        text = json.dumps(content, indent=2, ensure_ascii=False)
        config.write_text(f"{text}\n", "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
