"""A process that has screened may fork, and parent and child go on screening."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")

PRELUDE = """
import multiprocessing, os, sys, threading
from alknet_firewall import Firewall

firewall = Firewall(sys.argv[1], engine=sys.argv[2], threads=2)
text = sys.argv[3]
expected = firewall.screen(text)

def child_screens():
    assert firewall.screen(text) == expected
    assert firewall.screen_batch([text] * 8) == [expected] * 8
    assert Firewall(sys.argv[1], threads=2).screen(text) == expected or sys.argv[2] == "candle"
"""

OS_FORK = """
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child_screens()
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
    assert firewall.screen(text) == expected
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
assert firewall.screen(text) == expected
"""

FORK_OF_A_FORK = """
pid = os.fork()
if pid == 0:
    child_screens()
    grandchild = os.fork()
    if grandchild == 0:
        child_screens()
        os._exit(0)
    os._exit(os.waitpid(grandchild, 0)[1] and 1)
assert os.waitpid(pid, 0)[1] == 0
"""

FORK_WHILE_OTHERS_SCREEN = """
stop = threading.Event()
def work():
    while not stop.is_set():
        assert firewall.screen(text) == expected
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        child_screens()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
"""

MULTIPROCESSING = """
def work(i):
    return firewall.screen(text) == expected

with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(pool.map(work, range(12)))
assert firewall.screen(text) == expected
"""


@pytest.mark.parametrize("engine", ["native", "candle"])
@pytest.mark.parametrize(
    "script",
    [OS_FORK, FORK_OF_A_FORK, FORK_WHILE_OTHERS_SCREEN, MULTIPROCESSING],
    ids=["os_fork", "fork_of_a_fork", "fork_while_others_screen", "multiprocessing"],
)
def test_parent_and_children_screen(tiny_folder, script, engine):
    run(script, tiny_folder, engine, "The committee meets on Tuesday. " * 30)


def test_the_embedded_detector(real_folder):
    run(OS_FORK, real_folder, "native", "The committee meets on Tuesday. " * 10)


def run(script: str, folder: object, engine: str, text: str) -> None:
    code = textwrap.dedent(PRELUDE + script + "print('done')\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), engine, text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
