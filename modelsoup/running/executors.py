"""Where nodes run: processes of this machine, a Dask or Ray cluster, or any `Executor`.

The store and the plan's folder must lie where every worker sees them under the same paths.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any
from urllib.parse import urlsplit

from ..errors import ParameterError, RunError, counted, how_to_install, nearest, option
from .processes import Interpreters, ProcessExecutor, WorkerLostError, answer, placed, plainly

_KINDS = ("local", "processes:N", "dask://HOST:PORT", "ray", "ray://HOST:PORT")
_PATIENCE = 10.0  # seconds for a cluster to answer, and for its workers to come
_AGAIN = 0.5  # seconds between two looks for workers


class DaskExecutor(Executor):
    """Dask's own executor, with a new process on the worker for each call.

    So a trainer that crashes does not take the worker along, and a worker that lives for long
    keeps neither an old version of a trainer's module nor one from another plan's folder.

    Args:
        client: a `distributed.Client`.
    """

    takes_resources = True

    def __init__(self, client: Any) -> None:
        self._client = client
        self._executor = client.get_executor(pure=False, retries=0)

    def submit(  # type: ignore[override]  # one keyword more
        self, fn: Callable[..., Any], /, *args: Any, resources: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Future[Any]:  # fmt: skip
        """Call `fn` on a worker that offers the resources; `gpus` is what Dask calls `GPU`."""
        wanted = {_NAMES.get(name, name): amount for name, amount in (resources or {}).items()}
        if wanted and not _is_offered(wanted, self._offers):
            return _refused(f"no worker of the cluster offers {_listed(wanted)}")
        call = pickle.dumps((fn, args, kwargs))
        future: Future[Any] = self._executor.submit(
            _in_a_process, call, tuple(sys.path), resources=wanted or None
        )
        return future

    def _offers(self) -> Iterable[Mapping[str, float]]:
        try:
            told = self._client.scheduler_info(n_workers=-1)
        except TypeError:  # an older one, which tells of all
            told = self._client.scheduler_info()
        return [worker["resources"] for worker in told["workers"].values()]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`; calls that run go on to their end."""
        self._executor.shutdown(wait and not cancel_futures)


_NAMES = {"gpus": "GPU", "cpus": "CPU"}  # ours, and those of clusters


def _is_offered(
    wanted: Mapping[str, float], offers: Callable[[], Iterable[Mapping[str, float]]],
    patience: float = _PATIENCE,
) -> bool:  # fmt: skip
    """Whether any worker has all that a call wants; one may be about to come."""
    deadline = time.monotonic() + patience
    while True:
        for offer in offers():
            if all(offer.get(name, 0) >= amount for name, amount in wanted.items()):
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_AGAIN)


def _refused(said: str) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(RunError(said))
    return future


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in resources.items())


def _in_a_process(call: bytes, path: Sequence[str]) -> Any:
    """On a Dask worker: a call in a process of its own."""
    return answer(Interpreters(), placed(call, os.environ, path))


class RayExecutor(Executor):
    """`submit` as a Ray task.

    Args:
        address: a cluster's, or None to start one here (or to join that of RAY_ADDRESS).
        workers: how many CPUs a Ray that is started here has.
    """

    takes_resources = True

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        import ray

        if address is not None:
            _must_answer(address, "Ray cluster")
        self._ray = ray
        self._connected = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._alone = self._connected and address == "local"
        if self._connected:
            here = {"num_cpus": workers, "include_dashboard": False} if self._alone else {}
            ray.init(address, log_to_driver=False, logging_level="error", **here)
        self._tasks: dict[Future[Any], Any] = {}

    def submit(  # type: ignore[override]  # one keyword more
        self, fn: Callable[..., Any], /, *args: Any, resources: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Future[Any]:  # fmt: skip
        """Call `fn` on a worker that has the resources, one CPU if none are named."""
        outer: Future[Any] = Future()
        wanted = {"cpus": 1, **(resources or {})}
        named = {_NAMES.get(name, name): amount for name, amount in wanted.items()}
        # Nobody adds machines to a Ray of this machine.
        if resources and not _is_offered(named, self._offers, 0 if self._alone else _PATIENCE):
            where = "the Ray that was started here" if self._alone else "no node of the cluster"
            has = "has no" if self._alone else "has"
            return _refused(f"{where} {has} {_listed(resources)}")
        options: dict[str, Any] = {
            "num_cpus": wanted.pop("cpus"), "num_gpus": wanted.pop("gpus", 0),
            "max_retries": 0, "resources": wanted,
        }  # fmt: skip
        task = self._ray.remote(_on_ray).options(**options).remote(sys.path, fn, args, kwargs)

        def passed_on(done: Future[Any]) -> None:
            if not outer.set_running_or_notify_cancel():
                return
            try:
                finished, value = done.result()
            except Exception as error:  # noqa: BLE001  # passed on to who waits
                said = str(error).partition("\n")[0] or type(error).__name__
                outer.set_exception(WorkerLostError(said))
                return
            if finished:
                outer.set_result(value)
            else:
                outer.set_exception(value)

        self._tasks[outer] = task
        task.future().add_done_callback(passed_on)
        return outer

    def _offers(self) -> Iterable[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def terminate(self) -> None:
        """End every call that runs."""
        for future, task in self._tasks.items():
            if not future.done() or future.cancelled():
                self._ray.cancel(task, force=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`; a Ray that was started here is stopped."""
        if cancel_futures:
            self.terminate()
        elif wait:
            concurrent.futures.wait(list(self._tasks))
        if self._connected:
            self._ray.shutdown()


def _on_ray(path: Sequence[str], fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """On a Ray worker, which lives for one run only: a call that may import what we can."""
    sys.path.extend(folder for folder in path if folder and folder not in sys.path)
    return plainly(fn, args, kwargs)


@contextlib.contextmanager
def executor_from(text: str, workers: int | None = None) -> Iterator[Executor]:
    """An executor from its name: `local`, `processes:N`, `dask://HOST:PORT`, `ray`, `ray://…`.

    Args:
        text: its name.
        workers: how many nodes run at the same time, for `local` (default 1) and a local `ray`.

    Raises:
        ParameterError: no such executor, or its package is not installed.
    """
    kind, colon, rest = text.partition(":")
    if text == "local" or (kind == "processes" and colon):
        count = _count(rest, text) if colon else workers or 1
        if workers not in (None, count):
            other = option("workers", str(workers))
            raise ParameterError(
                f"{text} runs {counted(count, 'node')} at the same time, {other} another number: "
                f"give one"
            )
        pool = ProcessExecutor(count)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    elif kind == "dask" and rest.startswith("//"):
        try:
            from distributed import Client
        except ImportError:
            raise ParameterError(f"dask:// needs an extra: {how_to_install('dask')}") from None
        _must_answer(text, "Dask scheduler")
        try:
            client = Client(f"tcp:{rest}", timeout=_PATIENCE)
        except OSError as error:
            raise ParameterError(f"no Dask scheduler answers at {rest[2:]}") from error
        with client:
            yield DaskExecutor(client)
    elif text == "ray" or text.startswith("ray://"):
        try:
            ray = RayExecutor(None if text == "ray" else text, workers)
        except ImportError:
            raise ParameterError(f"ray needs an extra: {how_to_install('ray')}") from None
        except (OSError, ConnectionError) as error:
            raise ParameterError(f"no Ray cluster answers at {text}") from error
        try:
            yield ray
        finally:
            ray.shutdown(wait=False)
    else:
        raise ParameterError(
            f"no executor is called {text!r}{nearest(text, _KINDS)} (expected {', '.join(_KINDS)})"
        )


def _must_answer(address: str, what: str) -> None:
    """Find at once, and in one sentence, what a cluster's own client says late and at length."""
    host = address.partition("//")[2]
    try:
        parts = urlsplit(address)
        target = parts.hostname, parts.port
    except ValueError:  # the port is no number
        target = None, None
    if None in target:
        raise ParameterError(f"{address} is no address of a {what} (expected HOST:PORT)")
    try:
        socket.create_connection(target, _PATIENCE).close()
    except OSError as error:
        raise ParameterError(f"no {what} answers at {host}: {error.strerror or error}") from error


def _count(text: str, whole: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ParameterError(f"the executor {whole!r} needs a number of processes, such as 4")
    return count
