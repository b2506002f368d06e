"""The steps of the Argo workflow in containers of the real image, in order, against a real S3 server.

Two folders are mounted that no template names: the model's code, which a user has in an image of their own, and that of
the registry's SQLite file, which stands for a server.
"""

import os
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from automerge.preservation import Evaluation
from automerge.testing.s3_server import S3Server
from automerge_pipelines.argo import write_argo
from automerge_pipelines.flow import FLOW, S3_SECRET_KEYS
from automerge_pipelines.settings import Settings
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.pipelines.argo_executor import RunStep, run_workflow
from tests.system.images import ROOT, UID, Images

pytestmark = [pytest.mark.system, pytest.mark.images, pytest.mark.timeout(1200)]

CODE, REGISTRY = "/code", "/registry"


def container_runner(images: Images, more: dict[str, Path], log: list[list[str]]) -> RunStep:
    """Runs a step in a container that may do what the template lets it; ``more`` is mounted besides."""

    def run(image: str, argv: list[str], environment: dict[str, str], mounts: dict[str, Path]) -> int:
        log.append(argv)
        for place in mounts.values():  # what a pod's fsGroup does
            for path in [place, *place.rglob("*")]:
                os.chown(path, UID, UID)
        volumes = [f"--volume={host}:{path}" for path, host in {**mounts, **more}.items()]
        done = images.engine.docker(
            "run",
            "--rm",
            "--read-only",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--network=host",
            f"--user={UID}:{UID}",
            f"--entrypoint={argv[0]}",
            *[f"--env={key}={value}" for key, value in environment.items()],
            *volumes,
            image,
            *argv[1:],
            check=False,
            timeout=600,
        )
        print(f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}exit code {done.returncode}")
        return done.returncode

    return run


def test_the_steps_lead_to_a_registered_model(images: Images, s3: S3Server, pair: TinyPair, tmp_path: Path) -> None:
    for key in pair.keys:
        s3.client().upload_file(str(pair.folder / key), s3.bucket, f"argo-docker/{key}")
    more = {CODE: tmp_path / "code", REGISTRY: tmp_path / "registry"}
    for folder in more.values():
        folder.mkdir()
        folder.chmod(0o777)
    (more[CODE] / "tiny.py").write_bytes((ROOT / "tests/e2e/tiny.py").read_bytes())
    kept = {**s3.environment, "MLFLOW_TRACKING_URI": f"sqlite:///{REGISTRY}/mlflow.db"}
    secret = {key: kept.pop(key) for key in S3_SECRET_KEYS if key in kept}
    spec = tiny_spec(
        f"s3://{s3.bucket}/argo-docker",
        "sqlite:///unused",
        model={"kind": "factory", "target": "tiny:build", "python_path": [CODE]},
        compute={"device": "auto", "threads": 1},
    ).model_dump(mode="json")
    spec["registry"]["uri"] = None

    document = yaml.safe_load(write_argo(Settings(image=images.automerge), tmp_path / "argo.yaml").read_text())
    log: list[list[str]] = []
    (tmp_path / "run").mkdir()
    finished = run_workflow(
        document,
        tmp_path / "run",
        container_runner(images, more, log),
        parameters={"spec": yaml.safe_dump(spec)},
        secrets={"automerge-s3": secret},
        config_maps={"automerge": kept},
    )
    assert finished.status == "Succeeded"
    assert finished.phases == dict.fromkeys([*(row.name for row in FLOW), "report-status"], "Succeeded")
    assert set(finished.attempts.values()) == {1}
    assert len(log) == len(FLOW) + 1
    evaluation = Evaluation.read(finished.artifacts / "evaluate" / "evaluate" / "evaluation.json")
    registry = f"sqlite:///{more[REGISTRY] / 'mlflow.db'}"
    version = MlflowClient(registry, registry).get_model_version("tiny", "1")
    assert version.tags["automerge.recipe"] == evaluation.recipe
