"""Where nodes run: processes of this machine, a Dask or Ray cluster, or any `Executor`.

The store must lie where every worker sees it under the same path.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from .errors import ParameterError, nearest

_KINDS = ("local", "processes:N", "dask://HOST:PORT", "ray", "ray://HOST:PORT")
_GRACE = 2.0  # seconds between asking a process to end and ending it


class WorkerLostError(Exception):
    """The process that worked on something ended without saying how it went."""


class ProcessExecutor(Executor):
    """A new process for each call; `terminate` ends them all at once.

    Unlike `concurrent.futures.ProcessPoolExecutor`, one that is killed takes only its own call
    along, and calls that run can be ended.

    Args:
        workers: how many run at the same time.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="soup-process")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ending = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` in a process of its own; all must be picklable."""
        call = pickle.dumps((fn, args, kwargs))
        return self._threads.submit(self._call, call)

    def _call(self, call: bytes) -> Any:
        with self._lock:
            if self._ending:
                raise WorkerLostError("the run is ending")
            process = subprocess.Popen(
                [sys.executable, "-c", "from modelsoup.executors import _child; _child()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
            self._running.add(process)
        try:
            answer, _ = process.communicate(call)
        except BaseException:
            process.kill()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode or not answer:
            how = f"exit code {process.returncode}"
            if process.returncode < 0:
                how = f"signal {signal.Signals(-process.returncode).name}"
            raise WorkerLostError(f"a worker process ended with {how}")
        done, value = pickle.loads(answer)  # noqa: S301  # from our own child
        if not done:
            raise value
        return value

    def terminate(self) -> None:
        """End every call that runs, and start none."""
        with self._lock:
            self._ending = True
            running = list(self._running)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            deadline = time.monotonic() + _GRACE
            while any(p.poll() is None for p in running) and time.monotonic() < deadline:
                time.sleep(0.05)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


def _child() -> None:
    """The other side of `ProcessExecutor`: one call from stdin, its result to stdout."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the parent (PR_SET_PDEATHSIG)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let commands be ended too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answer_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get into the answer
    function, args, kwargs = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    try:
        answer = (True, function(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  # the parent raises it
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        answer = (False, error)
    with answer_to:
        answer_to.write(pickle.dumps(answer))


class RayExecutor(Executor):
    """`submit` as a Ray task.

    Args:
        address: a cluster's, or None to start one here.
        workers: how many CPUs a Ray that is started here has.
    """

    takes_resources = True

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(
                address=address, num_cpus=None if address else workers, include_dashboard=False,
                log_to_driver=False, configure_logging=False,
            )  # fmt: skip
        self._tasks: dict[Future[Any], Any] = {}

    def submit(  # type: ignore[override]  # one keyword more
        self, fn: Callable[..., Any], /, *args: Any, resources: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Future[Any]:  # fmt: skip
        """Call `fn` on a worker that has the resources, one CPU if none are named."""
        wanted = dict(resources or {})
        options: dict[str, Any] = {
            "num_cpus": wanted.pop("cpus", 1), "num_gpus": wanted.pop("gpus", 0),
            "max_retries": 0, "resources": wanted,
        }  # fmt: skip
        task = self._ray.remote(_plainly).options(**options).remote(fn, args, kwargs)
        inner = task.future()
        outer: Future[Any] = Future()
        outer.set_running_or_notify_cancel()

        def passed_on(done: Future[Any]) -> None:
            try:
                finished, value = done.result()
            except Exception as error:  # noqa: BLE001  # passed on to who waits
                outer.set_exception(WorkerLostError(str(error).splitlines()[0]))
                return
            if finished:
                outer.set_result(value)
            else:
                outer.set_exception(value)

        inner.add_done_callback(passed_on)
        self._tasks[outer] = task
        return outer

    def terminate(self) -> None:
        """End every call that runs."""
        for task in self._tasks.values():
            self._ray.cancel(task, force=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`; a Ray that was started here is stopped."""
        if cancel_futures:
            self.terminate()
        elif wait:
            concurrent.futures.wait(list(self._tasks))
        if self._started:
            self._ray.shutdown()


def _plainly(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
    """A call's result or error as a value: a cluster would wrap the error in its own."""
    try:
        return True, fn(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # who asked raises it
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        return False, error


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
        pool = ProcessExecutor(count)
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    elif kind == "dask" and rest.startswith("//"):
        try:
            from distributed import Client
        except ImportError:
            raise ParameterError("dask:// needs the extra: pip install 'modelsoup[dask]'") from None
        try:
            client = Client(f"tcp:{rest}", timeout="10s")
        except OSError as error:
            raise ParameterError(f"no Dask scheduler answers at {rest[2:]}") from error
        with client:
            yield client.get_executor(pure=False, retries=0)
    elif text == "ray" or text.startswith("ray://"):
        try:
            ray = RayExecutor(None if text == "ray" else text, workers)
        except ImportError:
            raise ParameterError("ray needs the extra: pip install 'modelsoup[ray]'") from None
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


def _count(text: str, whole: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ParameterError(f"the executor {whole!r} needs a number of processes, such as 4")
    return count
