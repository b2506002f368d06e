"""A Docker Engine of the tests' own (Debian: docker.io): a socket, data and containers that nothing else sees.

It makes no network: what runs has the host's, or none.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_SECONDS = 60.0
_DISK_BYTES = 60 << 30  # of which what is written takes room
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

# As a cluster runs a task of ours: nobody's user, nothing to write to but /tmp, and no privilege.
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")


@dataclass(frozen=True)
class DockerEngine:
    """A running engine; ``environment`` is what makes any client talk to it."""

    folder: Path
    program: str

    @property
    def environment(self) -> dict[str, str]:
        # Debian 12's client has BuildKit, which builds only the stages that count, and asks to be told.
        return {"DOCKER_HOST": f"unix://{self.folder / 'docker.sock'}", "DOCKER_BUILDKIT": "1"}

    def docker(
        self, *arguments: str | Path, check: bool = True, timeout: float = 300, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command of the Docker client; where it fails, its message is the test's."""
        command = [self.program, *map(str, arguments)]
        environment = os.environ | self.environment
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=timeout, **options
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done

    def run(
        self,
        image: str,
        *command: str,
        options: tuple[str, ...] = (),
        network: str = "none",
        check: bool = True,
        timeout: float = 300,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in a hardened container, which is removed when it ends."""
        return self.docker(
            "run", "--rm", *HARDENED, "--network", network, *options, image, *command, check=check, timeout=timeout
        )


@contextmanager
def running_engine() -> Iterator[DockerEngine]:
    """An engine while the context lasts; its containers, images and data go with it."""
    daemon = shutil.which("dockerd")
    assert daemon, "the Docker Engine is missing: apt-get install docker.io"
    # Debian's own client fits the engine; another one may be first on the path.
    client = next(filter(os.path.exists, ["/usr/bin/docker"]), None) or shutil.which("docker")
    assert client
    folder = Path(tempfile.mkdtemp(prefix="automerge-docker-"))  # short: the path of a socket has 107 bytes
    engine = DockerEngine(folder, client)
    try:
        _make_disk(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    # What has been built is built once, however full the disk is.
    (folder / "daemon.json").write_text('{"builder": {"gc": {"enabled": false}}}')
    command = [
        daemon,
        f"--config-file={folder / 'daemon.json'}",
        f"--host=unix://{folder / 'docker.sock'}",
        f"--data-root={folder / 'data'}",
        f"--exec-root={folder / 'exec'}",
        f"--pidfile={folder / 'docker.pid'}",
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        "--ip-masq=false",
        "--userland-proxy=false",
        "--shutdown-timeout=1",
    ]
    with (folder / "dockerd.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _await(engine, process)
        yield engine
    finally:
        _stop(engine, process)


def _make_disk(folder: Path) -> None:
    """A disk for the data, in one sparse file: the million files of some images would take minutes to delete.

    It has no journal, since nothing on it has to survive.
    """
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    (folder / "data").mkdir()
    format_it = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1", disk]
    subprocess.run(format_it, check=True)
    subprocess.run(["mount", "-o", "loop,noatime", disk, folder / "data"], check=True)


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await(engine: DockerEngine, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    while engine.docker("version", check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"dockerd does not start:\n{(engine.folder / 'dockerd.log').read_text()[-3000:]}")
        time.sleep(0.1)


def _stop(engine: DockerEngine, process: "subprocess.Popen[bytes]") -> None:
    """Remove the containers, end the engine (its containerd ends with it), and delete its data."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        containers = engine.docker("ps", "--all", "--quiet", check=False, timeout=30).stdout.split()
        if containers:
            engine.docker("rm", "--force", *containers, check=False, timeout=60)
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for mounted in _mounts(engine.folder):  # the disk, and what the engine leaves
        subprocess.run(["umount", "--lazy", mounted], check=False)
    shutil.rmtree(engine.folder)


def _mounts(folder: Path) -> list[str]:
    """What is mounted below a folder, the innermost first."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)
