"""What stands between Ray's process and a trial's watcher, tried without Ray: a parent that ends its children as Ray does, and the GPUs
of a trial that has ended and still saves."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# Says its number and each signal that it hears, and ends at SIGTERM with 7.
LISTENER = """
import os, signal, sys
def heard(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM:
        sys.exit(7)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, heard)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""
# Starts the listener as a trial is started and says the number of what it started.
PARENT = """
import os, sys
from trebuchet.ray_cluster import between
print(between.start([sys.executable, "-c", sys.argv[1]], dict(os.environ)).pid, flush=True)
input()
"""
# The module as a program.
CALLER = """
import sys
from trebuchet.ray_cluster import between
sys.exit(between.main([sys.executable, "-c", sys.argv[1]]))
"""


def line(pipe: int) -> str:
    """The next line, read byte by byte so that nothing is taken that `select` then cannot see; a minute of silence is a failure."""
    found = b""
    while not found.endswith(b"\n"):
        assert select.select([pipe], [], [], 60)[0], f"nothing was heard for a minute after {found!r}"
        if not (byte := os.read(pipe, 1)):
            break
        found += byte
    return found.decode().strip()


def listen(*words: str) -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen([sys.executable, "-c", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.fileno()


@pytest.mark.parametrize("ended", ["as Ray does", "parent"])
def test_a_watcher_hears_the_end_of_rays_process(ended: str) -> None:
    """Ray's process ends its direct children with SIGKILL as it exits, or is itself ended so."""
    parent, said = listen(PARENT, LISTENER)
    with parent:
        middle = int(line(said))
        watcher = psutil.Process(int(line(said)))
        assert [c.pid for c in psutil.Process(parent.pid).children()] == [middle] and watcher.ppid() == middle
        assert os.getsid(watcher.pid) == watcher.pid  # nothing sent to Ray's process group reaches it
        psutil.Process(middle if ended == "as Ray does" else parent.pid).kill()
        assert line(said) == "SIGTERM"
        watcher.wait(60)
        parent.kill()


def test_without_it_the_same_end_is_not_heard() -> None:
    """That the test above can fail: a direct child gets SIGKILL and says nothing."""
    child, said = listen(LISTENER)
    with child:
        line(said)
        child.kill()
        assert line(said) == "" and child.wait(60) == -signal.SIGKILL


def test_a_wish_for_a_checkpoint_and_the_exit_code_are_handed_on() -> None:
    caller, said = listen(CALLER, LISTENER)
    with caller:
        watcher = int(line(said))
        caller.send_signal(signal.SIGUSR1)
        assert line(said) == "SIGUSR1"
        os.kill(watcher, signal.SIGTERM)
        assert line(said) == "SIGTERM"
        assert caller.wait(60) == 7


# Says that it asks for the GPUs, and when it has them, and keeps them.
HOLDER = """
import os, sys
from trebuchet.ray_cluster import one_node
print("asking", flush=True)
with one_node.alone_on(one_node.gpus_of(os.environ)):
    print("mine", flush=True)
    input()
"""


def test_a_trial_waits_for_gpus_whose_last_one_still_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are files: no GPU is needed. Another GPU, or one of that number in another Ray node, is not waited for."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start(node: str, gpus: str) -> tuple[subprocess.Popen[bytes], int]:
        monkeypatch.setenv("TREBUCHET_RAY_NODE", node)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        return listen(HOLDER)

    with contextlib.ExitStack() as stack:
        those = [start("a", "0,1"), start("a", "2"), start("b", "0"), start("a", "")]
        for process, said in those:
            stack.callback(process.kill)
            assert [line(said), line(said)] == ["asking", "mine"]
        process, said = start("a", "1")
        stack.callback(process.kill)
        assert line(said) == "asking"
        assert not select.select([said], [], [], 1)[0], "two trials had one GPU"
        those[0][0].kill()
        assert line(said) == "mine"
