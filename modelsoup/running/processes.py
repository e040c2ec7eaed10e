"""Each call in a process of its own, on this machine.

An interpreter with all that a node needs takes a third of a second to start. On Linux there is one
such, which has one thread and forks for every call: that takes milliseconds. Elsewhere an
interpreter is started for every call: libraries of macOS do not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import IO, Any, NoReturn, Protocol

from ..merging.threads import usable_cores

_GRACE = 2.0  # seconds between asking a process to end and ending it
_OMP = "OMP_NUM_THREADS"  # read when a library is loaded, and numpy is loaded ahead of the call
_LOOK = 2.0  # seconds between two looks whether who forks is still wanted
_END = b"end"
_CALL = b"call"
_CODE = struct.Struct("i")  # an exit code
_CAN_FORK = sys.platform == "linux"
_ENDING = "the run is ending"


class WorkerLostError(Exception):
    """The process that worked on something ended without saying how it went."""


class ProcessExecutor(Executor):
    """A new process for each call; `terminate` ends them all at once.

    Unlike `concurrent.futures.ProcessPoolExecutor`, one that is killed takes only its own call
    along, and calls that run can be ended. Each finds `sys.path`, the working folder and the
    environment as they are when it is submitted.

    The cores are divided among them: `OMP_NUM_THREADS`, by which torch, OpenBLAS and others go, is
    set unless it was. Several programs that each use all cores are slower than one after the other.

    Attributes:
        workers: how many run at the same time.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="soup-process")
        self._omp = {_OMP: str(max(1, usable_cores() // workers))}
        self._way: _Way = (_Forks if _CAN_FORK else Interpreters)({**self._omp, **os.environ})
        self._lock = threading.Lock()
        self._running = 0
        self._closed = False
        weakref.finalize(self, self._way.close)  # who forgets `shutdown` leaves nothing behind

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` in a process of its own; all must be picklable."""
        call = placed(pickle.dumps((fn, args, kwargs)), {**self._omp, **os.environ})
        return self._threads.submit(self._call, call)

    def _call(self, call: bytes) -> Any:
        with self._lock:
            self._running += 1
        try:
            return answer(self._way, call)
        finally:
            with self._lock:
                self._running -= 1
            self._close_if_idle()

    def terminate(self) -> None:
        """End every call that runs, and start none."""
        self._way.terminate()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in `concurrent.futures.Executor`."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        with self._lock:
            idle = self._closed and not self._running
        if idle:
            self._way.close()


class _Way(Protocol):
    """How processes come about."""

    def call(self, call: bytes) -> bytes:
        """What a process answers to a call; raises `WorkerLostError` where it does not."""

    def terminate(self) -> None:
        """Ask every process to end, end those that do not, and start none any more."""

    def close(self) -> None:
        """Leave nothing behind, once nothing runs."""


def placed(call: bytes, environment: Mapping[str, str], path: Sequence[str] = ()) -> bytes:
    """A call with what its process goes by: it imports as this one does, then from `path`."""
    place = list(dict.fromkeys(filter(None, (*sys.path, *path)))), os.getcwd(), dict(environment)
    return pickle.dumps((place, call))


def answer(way: _Way, call: bytes) -> Any:
    """What a call returns or raises.

    Raises:
        WorkerLostError: its process ended before it could say.
    """
    done, value = pickle.loads(way.call(call))  # noqa: S301  # from our own child
    if not done:
        raise value
    return value


def plainly(fn: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
    """A call's result or error as a value: a cluster would wrap the error in its own."""
    try:
        return True, fn(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  # who asked raises it
        error.__traceback__ = None
        error.__cause__ = error.__context__ = None
        return False, error


def _answered(call: bytes) -> bytes:
    """In a process of its own: the answer to a call."""
    (path, folder, environment), inner = pickle.loads(call)  # noqa: S301  # our parent's
    sys.path[:] = path
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return pickle.dumps(plainly(*pickle.loads(inner)))  # noqa: S301


def _checked(answer: bytes, code: int) -> bytes:
    """An answer, if its process ended well.

    Raises:
        WorkerLostError: it did not, or gave none.
    """
    if code or not answer:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise WorkerLostError(f"a worker process ended with {how}")
    return answer


def _command(function: str, *arguments: object) -> list[str]:
    """This interpreter, calling a function of this module with numbers."""
    # Not by PYTHONPATH, which a trainer's command, perhaps in another Python, would inherit.
    code = (
        "import sys; sys.path[:] = sys.argv[1:]; "
        f"from modelsoup.running.processes import {function} as run; "
        f"run({', '.join(map(str, arguments))})"
    )
    return [sys.executable, "-c", code, *filter(None, sys.path)]


def _end_with_parent() -> None:
    """Have this process ended when its parent is, which only Linux offers."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# --- an interpreter for each call ---


class Interpreters:
    """A new interpreter for each call.

    Args:
        environment: that it starts with; None is this process's.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def call(self, call: bytes) -> bytes:
        """What a process answers to a call; raises `WorkerLostError` where it does not."""
        with self._lock:
            if self._ending:
                raise WorkerLostError(_ENDING)
            process = subprocess.Popen(  # noqa: S603  # this very interpreter
                _command(_one_call.__name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                start_new_session=True, env=self._environment,
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
        return _checked(answer, process.returncode)

    def terminate(self) -> None:
        """Ask every process to end, end those that do not, and start none any more."""
        with self._lock:
            self._ending = True
            running = list(self._running)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                if process.poll() is None:
                    _signal(process.pid, sign)
            deadline = time.monotonic() + _GRACE
            while any(p.poll() is None for p in running) and time.monotonic() < deadline:
                time.sleep(0.05)

    def close(self) -> None:
        """Leave nothing behind, once nothing runs."""


def _one_call() -> None:
    """The other side of `Interpreters`: one call from stdin, its answer to stdout."""
    _end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let commands be ended too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    answer_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get into the answer
    from .node import get_ready

    get_ready()
    call = sys.stdin.buffer.read()
    if call:  # else the parent is gone
        with answer_to:
            answer_to.write(_answered(call))


# --- a fork for each call ---


class _Forks:
    """A process that was started ahead, of which each call gets a fork.

    Calls and answers are files in memory, passed along by their descriptors. When the last
    descriptor of this side is closed, however that happens, all processes end.

    Args:
        environment: of the process that forks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()
        self._ending = False
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # this very interpreter
                _command(_fork_for_calls.__name__, theirs.fileno(), os.getpid()),
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env=self._environment,
            )  # fmt: skip

    def call(self, call: bytes) -> bytes:
        """What a process answers to a call; raises `WorkerLostError` where it does not."""
        with _in_memory(call) as given, _in_memory() as answer:
            end, tell = os.pipe()
            with open(end, "rb") as ended:
                try:
                    self._ask(given.fileno(), answer.fileno(), tell)
                finally:
                    os.close(tell)
                code = ended.read(_CODE.size)
            if len(code) < _CODE.size:
                raise WorkerLostError("a worker process could not be started or was lost sight of")
            answer.seek(0)
            return _checked(answer.read(), *_CODE.unpack(code))

    def _ask(self, *descriptors: int) -> None:
        with self._lock:
            if self._ending:
                raise WorkerLostError(_ENDING)
            try:
                socket.send_fds(self._control, [_CALL], descriptors)
            except OSError:  # somebody has ended it
                self._stop()
                self._start()
                socket.send_fds(self._control, [_CALL], descriptors)

    def terminate(self) -> None:
        """Ask every process to end, end those that do not, and start none any more."""
        with self._lock, contextlib.suppress(OSError):
            self._ending = True
            self._control.send(_END)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE + 1)
        self.close()

    def close(self) -> None:
        """Leave nothing behind, once nothing runs."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()


def _in_memory(content: bytes = b"") -> IO[bytes]:
    """A file that lies nowhere."""
    file = open(os.memfd_create("modelsoup"), "w+b")  # noqa: SIM115  # the caller closes it
    file.write(content)
    file.flush()
    return file


def _fork_for_calls(control_number: int, parent: int) -> None:
    """The other side of `_Forks`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # what a trainer prints is no result of the run
    gc.disable()
    from .node import get_ready

    get_ready()
    gc.freeze()  # so that no collection in a fork copies what is there already
    gc.enable()
    control = socket.socket(fileno=control_number)
    control.set_inheritable(False)
    ended, wake = os.pipe()
    for number in (ended, wake):
        os.set_blocking(number, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[int, int] = {}  # process → where its end is told
    deadline: float | None = None
    while deadline is None or (forks and time.monotonic() < deadline):
        patience = _LOOK if deadline is None else 0.05
        ready, _, _ = select.select([control.fileno(), ended], [], [], patience)
        if ended in ready:
            os.read(ended, 4096)
        _tell_ends(forks)
        if os.getppid() != parent:
            break
        if control.fileno() not in ready:
            continue
        message, numbers, _, _ = socket.recv_fds(control, len(_CALL), 3)
        if message == _CALL:
            given, answer, tell = numbers
            fork = _fork()
            if fork == 0:
                control.close()
                for number in (ended, wake, tell, *forks.values()):
                    os.close(number)
                _answer_in_fork(given, answer)
            os.close(given)
            os.close(answer)
            if fork is None:
                os.close(tell)
            else:
                forks[fork] = tell
        elif message == _END and deadline is None:
            deadline = time.monotonic() + _GRACE
            for fork in forks:
                _signal(fork, signal.SIGTERM)
        else:  # nobody can ask any more
            break
    for fork in forks:
        _signal(fork, signal.SIGKILL)
    os._exit(0)


def _fork() -> int | None:
    """As `os.fork`, into a process group of its own; None where there are too many processes."""
    forks_from = os.getpid()
    try:
        fork = os.fork()
    except OSError:
        return None
    if fork:
        with contextlib.suppress(OSError):  # it has done so itself, or has ended
            os.setpgid(fork, fork)
        return fork
    _end_with_parent()
    if os.getppid() != forks_from:  # it has ended before that was said
        os._exit(1)
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let commands be ended too
    return 0


def _tell_ends(forks: dict[int, int]) -> None:
    """Pass on how forks ended, to who waits for it."""
    while forks:
        fork, status = os.waitpid(-1, os.WNOHANG)
        if not fork:
            break
        tell = forks.pop(fork)
        with contextlib.suppress(OSError):
            os.write(tell, _CODE.pack(os.waitstatus_to_exitcode(status)))
        os.close(tell)


def _answer_in_fork(given: int, answer: int) -> NoReturn:
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()  # else all forks would draw the same; Python's own `random` sees to it
    with open(given, "rb") as file:
        file.seek(0)
        call = file.read()
    with open(answer, "wb") as file:
        file.write(_answered(call))
    # As an interpreter ends, but for taking all modules apart, which takes longer than a merge.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _signal(group: int, sign: signal.Signals) -> None:
    """Send a signal to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sign)
