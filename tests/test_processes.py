"""Each call in a process of its own, forked or started: what it finds, and that none is left."""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest

from modelsoup import ProcessExecutor
from modelsoup.running import processes
from modelsoup.running.processes import WorkerLostError

ON_LINUX = sys.platform == "linux"
forks = pytest.mark.skipif(not ON_LINUX, reason="platform: forks")


@pytest.fixture(params=[pytest.param(True, marks=forks), False], ids=["forks", "interpreters"])
def executor(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessExecutor]:
    """Both ways; the second is that of macOS, and of Dask's workers."""
    monkeypatch.setattr(processes, "_CAN_FORK", request.param)
    with ProcessExecutor(2) as executor:
        yield executor
    assert not children(os.getpid())


def children(process: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    return [int(pid) for pid, parent, name in rows if int(parent) == process and name != "ps"]


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(what, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def place() -> tuple[int, str, str | None, list[str]]:
    return os.getpid(), str(Path.cwd()), os.environ.get("HERE"), list(sys.path)


def test_each_call_has_a_process_and_finds_what_holds_when_it_is_submitted(
    executor: ProcessExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = executor.submit(place).result()
    (tmp_path / "later.py").write_text("def here():\n    return __name__\n")
    monkeypatch.setenv("HERE", "there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    second = executor.submit(place).result()
    assert first[0] != second[0] != os.getpid()
    assert second[1:] == (str(tmp_path), "there", list(dict.fromkeys(filter(None, sys.path))))
    import later  # type: ignore[import-not-found]

    assert executor.submit(later.here).result() == "later"


def draws() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def test_processes_draw_different_numbers(executor: ProcessExecutor) -> None:
    drawn = [executor.submit(draws).result() for _ in range(3)]
    assert len({python for python, _ in drawn}) == len({of_numpy for _, of_numpy in drawn}) == 3


def refuses() -> None:
    raise ValueError("not today")


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ends(code: int) -> None:
    os._exit(code)


def test_an_error_is_raised_and_a_lost_process_takes_its_own_call_along_only(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    other = executor.submit(waits_for, tmp_path / "gate")
    with pytest.raises(ValueError, match="not today"):
        executor.submit(refuses).result()
    with pytest.raises(WorkerLostError, match="ended with signal SIGKILL"):
        executor.submit(kills_itself).result()
    with pytest.raises(WorkerLostError, match="ended with exit code 7"):
        executor.submit(ends, 7).result()
    (tmp_path / "gate").touch()
    assert other.result() == "through"


def waits_for(gate: Path) -> str:
    wait_for(gate.exists, 60)
    return "through"


def prints_and_reads() -> str:
    os.write(1, b"printed\n")
    print("printed, too")
    return sys.stdin.read()


def test_what_is_printed_is_neither_an_answer_nor_a_result(
    executor: ProcessExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    assert executor.submit(prints_and_reads).result() == ""
    assert capfd.readouterr().out == ""


def large(size: int) -> bytes:
    return bytes(size)


def test_large_calls_and_answers_pass(executor: ProcessExecutor) -> None:
    assert executor.submit(len, bytes(20_000_000)).result() == 20_000_000
    assert len(executor.submit(large, 20_000_000).result()) == 20_000_000


def leaves_work(folder: Path) -> None:
    atexit.register((folder / "at exit").touch)
    threading.Thread(target=lambda: (time.sleep(0.3), (folder / "in a thread").touch())).start()


def test_a_process_ends_as_an_interpreter_does(executor: ProcessExecutor, tmp_path: Path) -> None:
    executor.submit(leaves_work, tmp_path).result()
    assert {path.name for path in tmp_path.iterdir()} == {"at exit", "in a thread"}


def multiplies(size: int) -> float:
    return float((np.ones((size, size)) @ np.ones((size, size)))[0, 0])


def test_linear_algebra_works_beside_that_of_other_processes(executor: ProcessExecutor) -> None:
    sums = [executor.submit(multiplies, 700) for _ in range(4)]
    assert [future.result(60) for future in sums] == [700.0] * 4


def notes_and_sleeps(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    (folder / f"{os.getpid()} {child.pid}").touch()
    time.sleep(60)


def notes_itself(folder: Path) -> None:
    (folder / f"{os.getpid()}").touch()
    time.sleep(60)


def noted(folder: Path, count: int) -> list[int]:
    wait_for(lambda: len(list(folder.iterdir())) == count)
    return [int(pid) for path in folder.iterdir() for pid in path.name.split()]


def test_terminate_ends_all_calls_with_what_they_started(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    calls = [executor.submit(notes_and_sleeps, tmp_path) for _ in range(3)]
    pids = noted(tmp_path, 2)
    begin = time.monotonic()
    executor.terminate()
    assert time.monotonic() - begin < 5
    assert not wait(calls, 5).not_done
    assert all(isinstance(call.exception(), WorkerLostError) for call in calls)
    wait_for(lambda: not any(map(is_running, pids)))
    assert len(list(tmp_path.iterdir())) == 2  # the third never began
    with pytest.raises(WorkerLostError, match="the run is ending"):
        executor.submit(refuses).result()


def is_running(process: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    said = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(said) and not said.startswith("Z")


def tidies_up(folder: Path) -> None:
    def end(*_: object) -> None:
        time.sleep(0.3)
        (folder / "tidy").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_a_call_that_is_to_end_has_time_to_tidy_up(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    executor.submit(tidies_up, tmp_path)
    noted(tmp_path, 1)
    executor.terminate()
    assert (tmp_path / "tidy").exists()


def ignores(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notes_and_sleeps(folder)


def test_a_call_that_will_not_end_is_ended(executor: ProcessExecutor, tmp_path: Path) -> None:
    call = executor.submit(ignores, tmp_path)
    pids = noted(tmp_path, 1)
    begin = time.monotonic()
    executor.terminate()
    assert time.monotonic() - begin < 5
    with pytest.raises(WorkerLostError):
        call.result(5)
    wait_for(lambda: not any(map(is_running, pids)))


@forks
def test_who_forks_is_replaced_when_it_is_killed(tmp_path: Path) -> None:
    with ProcessExecutor(2) as executor:
        call = executor.submit(notes_and_sleeps, tmp_path)
        pids = noted(tmp_path, 1)
        (forker,) = children(os.getpid())
        os.kill(forker, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="lost sight of"):
            call.result(10)
        wait_for(lambda: not is_running(pids[0]))
        os.kill(pids[1], signal.SIGKILL)
        assert executor.submit(len, "four").result() == 4
    assert not children(os.getpid())


@pytest.mark.skipif(not ON_LINUX, reason="platform: macOS does not end a process with its parent")
@pytest.mark.parametrize("moment", ["at once", "while calls run"])
def test_nothing_outlives_a_killed_parent(tmp_path: Path, moment: str) -> None:
    code = (
        "import sys, time; from pathlib import Path; from modelsoup import ProcessExecutor; "
        "import test_processes as t; executor = ProcessExecutor(2); print(flush=True)\n"
        "for _ in range(2): executor.submit(t.notes_itself, Path(sys.argv[1]))\n"
        "time.sleep(60)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    parent.stdout.readline()
    (forker,) = children(parent.pid)
    if moment == "while calls run":
        noted(tmp_path, 2)
        assert len(children(forker)) == 2
    started = [forker, *children(forker)]
    parent.kill()
    _, said = parent.communicate()  # also: nobody holds its stderr open
    assert said == ""
    wait_for(lambda: not any(map(is_running, started)), 5)


def test_an_executor_that_is_forgotten_leaves_nothing_behind() -> None:
    code = (
        "from modelsoup import ProcessExecutor\n"
        "executor = ProcessExecutor(2); print(executor.submit(len, 'four').result())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_a_script_that_runs_a_tree_needs_no_guard(tmp_path: Path) -> None:
    """No process runs it again, as those of `multiprocessing` do that are not plain forks."""
    script = tmp_path / "script.py"
    script.write_text(
        "from modelsoup import ProcessExecutor\nprint('once')\n"
        "with ProcessExecutor(1) as executor:\n    print(executor.submit(len, 'four').result())\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n4\n", "")


@forks
def test_a_forks_price_is_milliseconds() -> None:
    with ProcessExecutor(1) as executor:
        executor.submit(len, "").result()
        begin = time.monotonic()
        for _ in range(20):
            executor.submit(len, "").result()
        assert (time.monotonic() - begin) / 20 < 0.15  # an interpreter with numpy takes 0.3 s alone
