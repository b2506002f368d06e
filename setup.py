"""Builds the compiled kernels of automerge.merging.kernels; everything else about the package is in pyproject.toml.

The compiler is Zig's C compiler, which comes as a package, so that neither a user's nor a builder's machine needs one,
and which links against an old glibc wherever it runs. The library is no Python module: one wheel fits all versions.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, FileError

FOLDER = Path("src/automerge/merging/kernels")
MACHINE = sysconfig.get_platform().removeprefix("linux-")
FLAGS = (
    "-O3",
    "-ffp-contract=off",  # a fused multiply-add rounds differently
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-pass-failed",  # a loop over a number of sources that is no constant cannot be unrolled
    "-shared",
    "-fPIC",
    "-s",
)


def has_kernels() -> bool:
    """Whether the kernels are built for this platform; elsewhere merging goes through torch, with a warning."""
    linux = sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and sys.maxsize > 2**32
    return linux and MACHINE in ("x86_64", "aarch64")


class BuildKernels(build_ext):
    """Compiles the kernels with Zig; its cache is temporary."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the version of Python in it."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile one library.

        Raises:
            CompileError: the compiler is not there, or failed.
        """
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        target = f"{MACHINE}-linux-gnu.2.17"
        # The paths are relative and the same everywhere, and so are the bytes.
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-target", target, "-o", str(library), *ext.sources]
        with tempfile.TemporaryDirectory(prefix="zig-") as cache:
            folders = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
            done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"the kernels cannot be compiled: {' '.join(command)} failed:\n{done.stderr.strip()}")

    def copy_extensions_to_source(self) -> None:
        """Put the library beside its sources, for an editable install.

        It is renamed into place, because running processes may have the old one mapped.

        Raises:
            FileError: the folder cannot be written.
        """
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            temporary = FOLDER / f".{built.name}.tmp"
            try:
                shutil.copy(built, temporary)
                temporary.replace(FOLDER / built.name)
            except OSError as error:
                raise FileError(
                    f"{FOLDER}: the compiled kernels cannot be put there ({error.strerror}); "
                    "make the folder writable, or install without --editable"
                ) from None


class KernelsWheel(bdist_wheel):
    """A wheel for any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The library depends on the processor and on glibc, and on nothing of Python."""
        return ("py3", "none", f"manylinux_2_17_{MACHINE}") if has_kernels() else super().get_tag()


def arguments() -> dict[str, Any]:
    """What the kernels add to the package; nothing where they are not built."""
    if not has_kernels():
        return {}
    return {
        "ext_modules": [
            Extension(
                "automerge.merging.kernels.libkernels",
                sources=[str(FOLDER / "kernels.c")],
                depends=[str(FOLDER / "elementwise.h")],
            )
        ],
        "cmdclass": {"build_ext": BuildKernels, "bdist_wheel": KernelsWheel},
    }


setup(**arguments())
