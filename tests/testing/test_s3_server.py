"""The local S3 server leaves nothing running, however its owner ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OWNER = """
import os, signal, sys
from pathlib import Path
from automerge.testing.s3_server import start_s3
server = start_s3(Path(sys.argv[1]))
print(server.process.pid, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_server_ends_with_its_owner(end: str, tmp_path: Path) -> None:
    owner = subprocess.run(
        [sys.executable, "-c", OWNER, str(tmp_path), end], check=False, capture_output=True, text=True
    )
    assert owner.returncode == (-signal.SIGKILL if end == "kill" else 0), owner.stderr
    pid = int(owner.stdout)
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < until, "still running"
        time.sleep(0.02)
    # The identity it made is for nobody else to read.
    assert (tmp_path / "identities.json").stat().st_mode & 0o077 == 0


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
