"""Names of low-rank adapters' tensors: which are factors of an update, and mean nothing alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

PEFT_PREFIX = "base_model.model."

Role = Literal["up", "mid", "down", "embedding up", "embedding down", "alpha", "magnitude",
               "bias", "added", "added bias", "whole"]  # fmt: skip

_NAMED = r"(\.\w+)?"  # PEFT may have the adapter's own name there
_IN_DIFFUSERS = r"(\.lora|\.lora_linear_layer|_lora)"
# What a tensor is, by how its name ends.
_ENDINGS: tuple[tuple[Role, str], ...] = (
    ("up", rf"(\.lora_B{_NAMED}|\.lora_up|{_IN_DIFFUSERS}\.up)\.weight"),
    ("down", rf"(\.lora_A{_NAMED}|\.lora_down|{_IN_DIFFUSERS}\.down)\.weight"),
    ("mid", r"\.lora_mid\.weight"),
    ("embedding up", rf"\.lora_embedding_B{_NAMED}"),
    ("embedding down", rf"\.lora_embedding_A{_NAMED}"),
    ("alpha", r"\.alpha"),
    ("magnitude", r"(\.lora_magnitude_vector(\.\w+)*|\.dora_scale)"),
    ("bias", rf"\.lora_B{_NAMED}\.bias"),
    ("added", r"\.diff"),
    ("added bias", r"\.diff_b"),
)
_ROLES = [(role, re.compile(rf"(?P<module>.+?){ending}")) for role, ending in _ENDINGS]
_MEAN_NOTHING_ALONE = ("up", "mid", "down", "embedding up", "embedding down", "magnitude", "bias")
_PRODUCTS = (
    ("LoHa", re.compile(r"(?P<module>.*)\.hada_[tw]\d.*")),
    ("LoKr", re.compile(r"(?P<module>.*)\.lokr_[tw]\d.*")),
    ("AdaLoRA", re.compile(r"(?P<module>.*)\.lora_E\b.*")),
    ("MLX' LoRA", re.compile(r"(?P<module>.*)\.lora_[ab]")),
    ("loralib's LoRA", re.compile(r"(?P<module>.*)\.lora_[AB]")),
    ("LoRA of several in one module", re.compile(r"(?P<module>.*)lora\d+\.(up|mid|down).*")),
)
KINDS = (
    *_PRODUCTS,
    ("OFT", re.compile(r".*\.(oft_|boft_).*")),
    ("IA3", re.compile(r".*\.(ia3_l\b|on_input$).*")),
    ("VeRA", re.compile(r".*\.vera_.*")),
    ("trainable tokens", re.compile(r".*\.(token_adapter|trainable_tokens_).*")),
)
"""Kinds of adapters that are not low-rank products, or not of a form that can be merged."""

_PROCESSOR = re.compile(r"\.processor\.(?=[^.]+$)")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+$)")
WORDS = ("lora", "lokr", "hada", "dora", "alpha")
"""One of them is in any name of a factor, in lower case; else in few names."""


def role_of(name: str) -> tuple[Role, str]:
    """What a tensor of an adapter is, and of which module; or itself, if it is a whole tensor."""
    for role, pattern in _ROLES:
        match = pattern.fullmatch(name)
        if match:
            module = match["module"].removeprefix(PEFT_PREFIX)
            moved = _PROCESSOR.sub(".", module)  # diffusers' attention, as it once was
            is_out = moved != module and moved.endswith(".to_out")
            return role, f"{moved}.0" if is_out else moved
    return "whole", _WRAPPED.sub("", name.removeprefix(PEFT_PREFIX))


def factors(names: Iterable[str]) -> list[str]:
    """The names that belong to a low-rank update: its factors, and what scales their product."""
    found: list[str] = []
    alphas: dict[str, str] = {}  # name → module
    modules: set[str] = set()
    for name in names:
        if not are_named(name):
            continue
        role, module = role_of(name)
        matches = (pattern.fullmatch(name) for _, pattern in _PRODUCTS)
        product = next(filter(None, matches), None)
        if role == "alpha":
            alphas[name] = module
        elif role in _MEAN_NOTHING_ALONE or product:
            found.append(name)
            modules.add(product["module"] if product else module)
    return [*found, *(name for name, module in alphas.items() if module in modules)]


def pattern_for(factor: str) -> str:
    """A short pattern that speaks of a factor, and so of others like it."""
    word = next(word for word in WORDS if word in factor)
    return "*.alpha" if word == "alpha" else f"*{word}*"


def are_named(pattern: str) -> bool:
    """Whether a rule's pattern speaks of factors: whoever writes it knows what they are."""
    return any(word in pattern.lower() for word in WORDS)
