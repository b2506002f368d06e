"""A stand-in for the official Python image, made of Debian packages: no registry of images is needed."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.system.docker_engine import DockerEngine

NAME = "python:3.11-slim-bookworm"
SUITE = "bookworm"  # the one with Python 3.11
PACKAGES = ("ca-certificates", "python3", "python3-pip")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# What the official image has and an imported file system has not; and the certificates that this machine trusts.
DOCKERFILE = """\
FROM stand-in
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
CMD ["python3"]
"""


def make_python_image(engine: DockerEngine) -> str:
    """Make the image in an engine; the file system below it is kept for the next time."""
    engine.docker("import", _file_system(), "stand-in")
    with tempfile.TemporaryDirectory(prefix="automerge-python-") as folder:
        (Path(folder) / "Dockerfile").write_text(DOCKERFILE)
        shutil.copy(CERTIFICATES, Path(folder) / "ca-certificates.crt")
        engine.docker("build", "--tag", NAME, folder)
    return NAME


def _file_system() -> Path:
    """The packages as a tar file in the user's cache; making it takes a minute or two."""
    packages, mirror = ",".join(PACKAGES), _mirror()
    key = hashlib.sha256("\n".join((SUITE, packages, mirror)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "automerge-tests"
    archive = cache / f"{SUITE}-{key}.tar"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    program = shutil.which("debootstrap")
    assert program, "debootstrap is missing: apt-get install debootstrap"
    with tempfile.TemporaryDirectory(prefix="automerge-debootstrap-") as folder:
        root = Path(folder) / "root"
        command = [program, "--variant=minbase", f"--include={packages}", SUITE, str(root), mirror]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, f"debootstrap failed:\n{(done.stdout + done.stderr)[-3000:]}"
        temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
        # As in the official image, nothing is left of the installation.
        left = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./var/log/*", "./dev/*", "./proc/*", "./sys/*")
        excluded = [f"--exclude={pattern}" for pattern in left]
        subprocess.run(["tar", "--create", *excluded, "--file", temporary, "--directory", root, "."], check=True)
        temporary.rename(archive)
    return archive


def _mirror() -> str:
    """Where this machine's Debian packages come from; it need not be bookworm itself."""
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(COMPONENT) $(RELEASE)", "Created-By: Packages"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sites = [site for site, component, _ in (line.split(" ", 2) for line in lines) if component == "main"]
    debian = [site for site in sites if site.rstrip("/").endswith("/debian")]
    assert debian, "no mirror of Debian's packages is among apt's sources"
    return debian[0]
