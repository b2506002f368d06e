"""The whole pipeline in containers of the real image, by `kfp.local`'s DockerRunner, against a real S3 server."""

import io
import json
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp import components, local
from kfp.local.config import LocalExecutionConfig
from mlflow import MlflowClient

from automerge.documents import write_atomically
from automerge.merging.recipe import Recipe
from automerge.searching.store import read_log
from automerge.spec import Spec
from automerge.stages.documents import Manifest, Registration
from automerge.testing.s3_server import S3Server
from automerge_pipelines.arguments import spec_argument
from automerge_pipelines.merge_pipeline import build_pipeline
from automerge_pipelines.settings import Settings, TaskSettings
from tests.e2e.tiny import TASKS, TinyPair, tiny_spec
from tests.system.images import ROOT, UID, Images

pytestmark = [pytest.mark.system, pytest.mark.images, pytest.mark.timeout(1200)]

# The first failure ends a run: what is tried again here is the run.
SETTINGS = Settings(defaults=TaskSettings(retries=0))

# A container that is removed before the runner asks how it ended counts as done: then the next task lacks its outputs.
FAILURES = (RuntimeError, ValueError)

# Added to the model's code: where a file `slow` is beside it, a trial takes half a second, and the search can be met.
SLOW = """
import time

_forward = TinyNet.forward


def _held_up(self, images):
    if Path(__file__).with_name("slow").exists():
        time.sleep(0.25)
    return _forward(self, images)


TinyNet.forward = _held_up
"""


@pytest.fixture
def uploaded(s3: S3Server, pair: TinyPair) -> str:
    """The tiny pair in a bucket; returns its URI."""
    for key in pair.keys:
        s3.client().upload_file(str(pair.folder / key), s3.bucket, f"docker/{key}")
    return f"s3://{s3.bucket}/docker"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The pipeline root: all that host and containers share, and so the place of the model's code and the registry."""
    folder = tmp_path / "root"
    (folder / "code").mkdir(parents=True)
    write_atomically(folder / "code/tiny.py", (ROOT / "tests/e2e/tiny.py").read_bytes() + SLOW.encode())
    folder.chmod(0o777)
    return folder


@pytest.fixture
def client_of_the_engine(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in images.engine.environment.items():
        monkeypatch.setenv(name, value)


def docker_spec(root: Path, uploaded: str, **changes: Any) -> Spec:
    model = {"kind": "factory", "target": "tiny:build", "python_path": [str(root / "code")]}
    changes = {"model": model, "compute": {"device": "auto", "threads": 1}, **changes}
    return tiny_spec(uploaded, f"sqlite:///{root / 'mlflow.db'}", **changes)


def run_pipeline(images: Images, spec: Spec, root: Path, environment: Mapping[str, str]) -> Path:
    """Run the pipeline, each task in a hardened container; returns the run's folder.

    Raises:
        RuntimeError, ValueError: a task failed.
    """
    known = set(runs(root))
    before = LocalExecutionConfig.instance
    runner = local.DockerRunner(
        network_mode="host",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        tmpfs={"/tmp": ""},
        environment=dict(environment),
    )
    try:
        local.init(runner, pipeline_root=str(root))
        pipeline_of(images.automerge)(spec=spec_argument(spec))
    finally:
        LocalExecutionConfig.instance = before
    (folder,) = set(runs(root)) - known
    return folder


def pipeline_of(image: str) -> Any:
    """The pipeline as it is compiled, with the image written into its tasks: this runner cannot take a parameter's."""
    graph = json_format.MessageToDict(build_pipeline(SETTINGS).pipeline_spec)
    for executor in graph["deploymentSpec"]["executors"].values():
        assert executor["container"]["image"] == "{{$.inputs.parameters['pipelinechannel--image']}}"
        executor["container"]["image"] = image
    return components.load_component_from_text(json.dumps(graph))


def runs(root: Path) -> list[Path]:
    """The folders of the runs so far, the oldest first."""
    return sorted(root.glob(f"{SETTINGS.name}-*"))


@pytest.mark.usefixtures("client_of_the_engine")
def test_from_s3_to_a_registered_version(images: Images, s3: S3Server, uploaded: str, root: Path) -> None:
    spec = docker_spec(root, uploaded)
    folder = run_pipeline(images, spec, root, s3.environment)

    manifest = Manifest.read(folder / "fetch/inputs/manifest.json")
    assert manifest.spec == spec.digest()
    assert all(item.uri.startswith("s3://") for item in manifest.inputs)
    recipe = Recipe.read(folder / "search-merge/search/recipe.json")
    assert {source.name for source in recipe.sources} == set(TASKS)
    header, _, _ = read_log(folder / "search-merge/search/trials.jsonl")
    assert header.hardware.startswith("cpu")
    registration = folder / "register/registration/registration.json"
    assert Registration.read(registration).registered.version == "1"
    version = MlflowClient(spec.registry.uri, spec.registry.uri).get_model_version("tiny", "1")
    assert version.tags["automerge.recipe"] == recipe.digest()
    # All of it was written by the containers, whose user is nobody here.
    assert {path.stat().st_uid for path in (*folder.rglob("*"), root / "mlflow.db")} == {UID}


@pytest.mark.usefixtures("client_of_the_engine")
def test_a_wrong_key_is_one_sentence(
    images: Images, s3: S3Server, uploaded: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(FAILURES):
        run_pipeline(images, docker_spec(root, uploaded), root, environment)
    said = capsys.readouterr().out
    (sentence,) = [line.strip() for line in said.splitlines() if line.strip().startswith("error: ")]
    assert "AWS_SECRET_ACCESS_KEY" in sentence
    assert "Traceback" not in said


@pytest.mark.usefixtures("client_of_the_engine")
def test_a_killed_search_goes_on_in_another_container(images: Images, s3: S3Server, uploaded: str, root: Path) -> None:
    """The second run has a folder of its own: all that it knows of the first is in S3."""
    trials = 60
    search = {"trials": trials, "initial": 8, "seed": 0, "split": None, "refine": None}
    spec = docker_spec(root, uploaded, search=search)
    environment = {
        **s3.environment,
        "AUTOMERGE_MIRROR": f"s3://{s3.bucket}/mirror",
        "AUTOMERGE_MIRROR_SECONDS": "0.2",
    }
    slow = root / "code/slow"
    slow.touch()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(run_pipeline, images, spec, root, environment)
        while len(mirrored(s3)) < 10:
            assert not first.done(), "it ended without a copy of its search"
            time.sleep(0.1)
        kill_the_search(images)
        with pytest.raises(FAILURES):
            first.result()
    slow.unlink()
    (killed,) = runs(root)
    assert not (killed / "search-merge/search/recipe.json").exists()
    paid = mirrored(s3)
    begun = tells((killed / "search-merge/search/trials.jsonl").read_bytes())
    print(f"{len(paid)} of {len(begun)} trials were in S3 when the search was killed")
    assert paid == begun[: len(paid)]
    assert 10 <= len(paid) < trials

    folder = run_pipeline(images, spec, root, environment)
    again = tells((folder / "search-merge/search/trials.jsonl").read_bytes())
    # Not one was evaluated again: it would have taken another time, to the microsecond.
    assert again[: len(paid)] == paid
    numbers = [tell["trial"]["number"] for tell in again]
    assert len(numbers) == len(set(numbers)) == trials
    assert Registration.read(folder / "register/registration/registration.json").registered.created


def kill_the_search(images: Images) -> None:
    """SIGKILL to the one container that runs, which is that of the search."""
    (container,) = images.engine.docker("ps", "--quiet").stdout.split()
    assert "search_merge" in images.engine.docker("inspect", container).stdout
    images.engine.docker("kill", "--signal", "KILL", container)


def mirrored(s3: S3Server) -> list[dict[str, Any]]:
    """The finished trials in the one search's copy; none while there is no copy."""
    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix="mirror/").get("Contents", [])
    keys = [item["Key"] for item in listed if item["Key"].endswith("/search.zip")]
    if not keys:
        return []
    (key,) = keys
    content = s3.client().get_object(Bucket=s3.bucket, Key=key)["Body"].read()
    with zipfile.ZipFile(io.BytesIO(content)) as copy:
        return tells(copy.read("trials.jsonl"))


def tells(log: bytes) -> list[dict[str, Any]]:
    """The finished trials of a log, whose last line may be torn."""
    events = [json.loads(line) for line in log.split(b"\n")[:-1]]
    return [event for event in events if event["event"] == "tell"]
