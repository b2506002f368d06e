"""How a process that runs stages unattended logs and ends; each in a process of its own, since it changes logging."""

import signal
import subprocess
import sys

import pytest

PRELUDE = """
import logging
from automerge.errors import SpecError
from automerge.stages.process import stage_process
logging.basicConfig(format="engine %(message)s", level="INFO")
with stage_process():
    logging.getLogger("automerge.test").info("working")
"""


def run(body: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PRELUDE + body], capture_output=True, text=True, check=False)


def test_a_users_error_is_one_sentence_and_its_exit_code() -> None:
    ended = run("    raise SpecError('spec: the key is missing', 'add it')\n")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: spec: the key is missing; add it"
    assert "Traceback" not in ended.stderr


def test_an_interrupt_is_one_sentence() -> None:
    ended = run("    raise KeyboardInterrupt\n")
    assert ended.returncode == 130
    assert ended.stderr.splitlines()[-1] == "error: interrupted; run the task again"
    assert "Traceback" not in ended.stderr


SIGTERM = """
import os, signal
from automerge.stages.process import interrupted_by_sigterm
terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
try:
    with interrupted_by_sigterm():
        terminate()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_sigterm_interrupts_once() -> None:
    ended = run(f"    pass\n{SIGTERM}terminate()")
    assert (ended.stdout, ended.returncode) == ("interrupted\n", -signal.SIGTERM)


def test_a_handler_of_the_process_stays() -> None:
    mine = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))\n"
    ended = run(f"    pass\n{mine}{SIGTERM}")
    assert (ended.stdout, ended.returncode) == ("mine\n", 0)


def test_other_threads_leave_signals_alone() -> None:
    body = SIGTERM.replace("        terminate()", "        print('inside', flush=True)")
    thread = "import threading\ndef work():\n" + "".join(f"    {line}\n" for line in body.splitlines())
    ended = run(f"    pass\n{thread}thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n")
    assert (ended.stdout, ended.returncode) == ("inside\n", 0)


def test_a_defect_keeps_its_traceback() -> None:
    ended = run("    raise ZeroDivisionError('ours')\n")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


def test_every_line_is_logged_once_although_the_engine_logs_too() -> None:
    ended = run("    pass\n")
    assert ended.returncode == 0
    assert ended.stdout == ""
    assert [line for line in ended.stderr.splitlines() if "working" in line] == ended.stderr.splitlines()
    assert ended.stderr.count("working") == 1


@pytest.mark.parametrize(("level", "lines"), [("WARNING", 0), ("nonsense", 1)])
def test_the_environment_sets_the_level(monkeypatch: pytest.MonkeyPatch, level: str, lines: int) -> None:
    monkeypatch.setenv("AUTOMERGE_LOG_LEVEL", level)
    assert len(run("    pass\n").stderr.splitlines()) == lines


def test_json_lines_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOMERGE_LOG_FORMAT", "json")
    assert run("    pass\n").stderr.startswith('{"ts": ')
