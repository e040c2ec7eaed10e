"""Networks through `torch.compile`, for whose compiler nobody waits without a bound.

torch compiles in the process that calls a network, where nothing can end it. So another process
compiles first: it calls each network as a step does, which fills inductor's cache on the disk, and
it is killed when its time is over. What it finished is then taken from that cache, and nothing is
ever compiled here: a network whose code is not there, and a call of another shape, go without.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from modelsoup import cache_folder

from .description import Description

# Of a parent that was killed, Linux tells by a signal; elsewhere the alarm comes when it is time.
_COMPILE = """
import ctypes, os, pickle, signal, sys
parent, seconds, told = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
signal.setitimer(signal.ITIMER_REAL, seconds)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGALRM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit()
from modelsoup_i2i.training.compiling import compile_ahead
compile_ahead(told, *pickle.loads(sys.stdin.buffer.read()))
"""
_GRACE = 5  # seconds after which a process ends itself that should have been ended
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_MOST = 64
_EXACT = {"fallback_random": True}  # dropout draws what it draws without compiling


class Stepped(Protocol):
    """A training, as `Cast` is one."""

    device: torch.device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All by name."""

    def begin(self) -> None:
        """Before the first step."""

    def set_plain(self, names: Collection[str]) -> None:
        """Have networks do without tricks that are the CPU's."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision."""


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor that a network is called with."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    wants: bool

    @classmethod
    def of(cls, value: Any) -> Any:
        """That, of a tensor; what is none is as it was."""
        if not isinstance(value, torch.Tensor):
            return value
        return cls(tuple(value.shape), value.stride(), value.dtype, value.requires_grad)

    def made(self, device: torch.device) -> torch.Tensor:
        """Such a tensor, of zeros; where it requires gradients, it is no leaf."""
        values = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        values.zero_()
        return values.requires_grad_() * 1 if self.wants else values


@dataclass(frozen=True)
class Called:
    """How a network was called.

    Attributes:
        inputs: with what.
        named: and with what by name.
        gradients: whether gradients were kept.
        trained: of each parameter, whether it required some.
    """

    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    gradients: bool
    trained: tuple[bool, ...]


Calls = dict[str, list[Called]]
"""By the name of a network, each of its calls that differs from the others."""

Training = tuple[Description, Any, Path | None, tuple[str, ...]]
"""The trainer, the options, the start, and the names that are frozen."""


def noted(into: list[Called], network: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Call a network, and note how, but where it is left uncompiled anyway."""
    if not _is_asked(inputs):
        how = Called(
            tree_map(Tensor.of, inputs), tree_map(Tensor.of, named), torch.is_grad_enabled(),
            tuple(parameter.requires_grad for parameter in network.parameters()),
        )  # fmt: skip
        if how not in into:
            into.append(how)
    return network(*inputs, **named)


def ahead(training: Training, calls: Calls, seconds: float) -> dict[str, str]:
    """Compile networks in another process, one by one, which is killed after so many seconds.

    Returns:
        why they are not, of those that are not.
    """
    if not calls:
        return {}
    try:
        own = pickle.dumps((*training, calls, torch.get_num_threads()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return dict.fromkeys(calls, f"no other process can have its trainer: {error}")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
    ):
        told, said = Path(folder, "told"), Path(folder, "said")
        told.touch()
        given.write(own)
        given.seek(0)
        with said.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, and a text of ours
                [sys.executable, "-c", _COMPILE, *map(str, (os.getpid(), seconds + _GRACE, told))],
                stdin=given, stdout=log, stderr=log,
                start_new_session=True,  # to be killed with the compilers that it starts
                # Killed, it removes nothing, such as a start whose rows were made anew.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": folder},
            )  # fmt: skip
        try:
            process.wait(seconds)
            lines = said.read_text("utf-8", "replace").strip().splitlines()
            rest = lines[-1] if lines else "the process that compiles them ended"
        except subprocess.TimeoutExpired:
            rest = f"that was not done after {seconds:g} s (compile_seconds)"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reasons = dict.fromkeys(calls, rest)
        whole, _, _ = told.read_text("utf-8").rpartition("\n")  # it may have ended within a line
        reasons |= dict(map(json.loads, whole.splitlines()))
    return {name: reason for name, reason in reasons.items() if reason is not None}


def compile_ahead(
    told: str, trainer: Any, options: Any, start: Path | None, frozen: Sequence[str], calls: Calls,
    threads: int,
) -> None:  # fmt: skip
    """What the other process does; it tells of each network when it is done, and why not if so."""
    torch.set_num_threads(threads)
    session: Stepped = trainer.session(options, start, seed=0, frozen=frozen)
    session.begin()
    session.set_plain(calls)
    for name, own in calls.items():
        reason = None
        try:
            compiled(session.networks[name], own, session, known=False)
        except Exception as error:  # noqa: BLE001  # of three libraries and a compiler
            reason = first_line(error)
        with Path(told).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, reason]) + "\n")


def compiled(
    network: nn.Module, calls: Sequence[Called], training: Stepped, *, known: bool
) -> Callable[..., Any]:
    """A network that is compiled for some calls; others are made without.

    Its buffers move, and torch's generators draw.

    Args:
        network: called as it is, in training or not.
        calls: of it.
        training: in whose place and precision.
        known: take only what is in the cache.

    Raises:
        Exception: it cannot be compiled, or is not in the cache; of whatever kind.
    """
    import torch._dynamo as dynamo

    made = torch.compile(network, backend=partial(_backend, known=known), dynamic=False)
    limit = {"recompile_limit": _MOST}  # of what is compiled of a class, for all networks of it
    with warnings.catch_warnings(), dynamo.config.patch(limit):
        warnings.simplefilter("ignore")  # torch's, of its own code
        for call in calls:
            made_as(call, made, network, training)
    return partial(_once, made, network)


def made_as(call: Called, made: Callable[..., Any], network: nn.Module, training: Stepped) -> None:
    """Call a network, or what was made of it, as it was called, on zeros, and go back through it.

    No parameter gets a gradient.
    """
    own = list(network.parameters())
    before = [parameter.requires_grad for parameter in own]
    for parameter, wants in zip(own, call.trained, strict=True):
        parameter.requires_grad_(wants)
    try:
        inputs, named = (tree_map(partial(_made, training.device), values)
                         for values in (call.inputs, dict(call.named)))  # fmt: skip
        with training.autocast(), torch.set_grad_enabled(call.gradients):
            result = made(*inputs, **named)
        _backward(result, [*own, *tree_leaves((inputs, named))])
    finally:
        for parameter, wants in zip(own, before, strict=True):
            parameter.requires_grad_(wants)


@contextmanager
def in_cache() -> Iterator[None]:
    """While inductor's cache is modelsoup's; torch names one as soon as it is looked for."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(cache_folder("inductor"))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before


def told(refused: Mapping[str, str]) -> Iterator[str]:
    """What the log says of networks that are not compiled: a line for each reason."""
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, own in refused.items() if own == reason]
        yield f"not compiled: {', '.join(names)}: {reason}"


def _once(made: Callable[..., Any], network: nn.Module, *inputs: Any, **named: Any) -> Any:
    """A compiled network, where nobody asks for gradients of its gradients.

    Those would be missing without a word. Whoever makes a leaf of what goes in, and lets it require
    gradients, as gradient penalties do, is about to ask.
    """
    if _is_asked(inputs):
        return network(*inputs, **named)
    with torch.compiler.set_stance("eager_on_recompile"):
        return made(*inputs, **named)


def _is_asked(inputs: Collection[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_leaf and x.requires_grad for x in inputs)


def _made(device: torch.device, value: Any) -> Any:
    return value.made(device) if isinstance(value, Tensor) else value


def _backward(result: Any, ends: Sequence[Any]) -> None:
    """Go back through a result, whose machine code is another's."""
    outputs = [one for one in tree_leaves(result)
               if isinstance(one, torch.Tensor) and one.requires_grad]  # fmt: skip
    wanted = [one for one in ends if isinstance(one, torch.Tensor) and one.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.zeros_like(one) for one in outputs],
                            allow_unused=True)  # fmt: skip


class NotThereError(RuntimeError):
    pass


def _backend(graph: Any, inputs: Any, *, known: bool) -> Any:
    """Inductor; where only what is known is taken, without its compiler."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner = partial(_known, compile_fx_inner) if known else compile_fx_inner
    return compile_fx(graph, inputs, inner_compile=inner, config_patches=_EXACT)


def _known(inner: Callable[..., Any], *given: Any, **named: Any) -> Any:
    with _nothing_is_compiled():
        return inner(*given, **named)


@contextmanager
def _nothing_is_compiled() -> Iterator[None]:
    """While inductor looks into its cache, and would compile what it does not find there."""
    import torch._inductor.compile_fx as inductor

    def refuse(*_given: Any, **_named: Any) -> Any:
        raise NotThereError("its machine code is not in inductor's cache")

    compiles: Any = inductor.fx_codegen_and_compile
    inductor.fx_codegen_and_compile = refuse
    try:
        yield
    finally:
        inductor.fx_codegen_and_compile = compiles


def first_line(error: Exception) -> str:
    """What an error says, without what torch says around it."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):
        return first_line(inner)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
