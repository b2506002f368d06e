"""The product's images, built by `make images` in an engine of the tests' own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

from tests.system.docker_engine import DockerEngine
from tests.system.python_image import make_python_image

ROOT = Path(__file__).parents[2]
VERSION = version("automerge-models")
REVISION = "0123456789abcdef0123456789abcdef01234567"
SOURCE = "https://example.invalid/automerge"
UID = 65532


@dataclass(frozen=True)
class Images:
    """The built images and the engine that has them.

    Attributes:
        engine: the engine.
        automerge, trigger: the images' names.
        wheels: address of the folder that torch came from, at the time of the build.
    """

    engine: DockerEngine
    automerge: str
    trigger: str
    wheels: str


@contextmanager
def built_images(engine: DockerEngine, folder: Path) -> Iterator[Images]:
    """Build both images; torch's wheels are served from loopback while the context lasts."""
    make_python_image(engine)
    with _served(_torch_wheel(folder)) as wheels:
        build = ["make", "images", f"DOCKER={engine.program}", f"REVISION={REVISION}", f"SOURCE={SOURCE}"]
        make([*build, "DOCKER_BUILD_FLAGS=--network host"], engine, wheels)
        yield Images(engine, f"automerge:{VERSION}", f"automerge-trigger:{VERSION}", wheels)


def make(command: list[str], engine: DockerEngine, wheels: str, *, check: bool = True) -> str:
    """Run a command that builds; returns what it said."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = ours | engine.environment | {"PIP_FIND_LINKS": wheels}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def _torch_wheel(folder: Path) -> Path:
    """A folder with the build of torch that is installed here, from wherever pip is told to look."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"torch=={version('torch')}"], check=True)
    return folder


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
