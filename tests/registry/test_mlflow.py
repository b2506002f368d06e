"""MLflow beyond the common contract: crashes, races, what is written, and errors in one sentence."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from automerge.errors import MissingExtraError, RegistryError
from automerge.registry.mlflow import MlflowRegistry
from automerge.registry.registry import RegistryEntry, load_registry
from automerge.spec import RegistrySpec, parse_spec
from automerge.testing.registries import make_entry


@pytest.fixture
def entry(tmp_path: Path) -> RegistryEntry:
    folder = tmp_path / "files"
    folder.mkdir()
    return make_entry(folder)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: making its tables takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def registry(database: str) -> MlflowRegistry:
    return MlflowRegistry(RegistrySpec(uri=database))


def runs_of(registry: MlflowRegistry, entry: RegistryEntry) -> list[Any]:
    return list(registry._client.search_runs([registry._experiment(entry.model)]))


def test_what_is_written(registry: MlflowRegistry, entry: RegistryEntry) -> None:
    made = registry.register(entry)
    client = registry._client
    version = client.get_model_version(entry.model, made.version)
    assert version.tags == {
        "automerge.recipe": entry.recipe_digest,
        "automerge.spec": "digits",
        "automerge.pr.low": "97.20",
        "automerge.gate": "pass",
    }
    assert version.description == "A merged model."
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"encoder.technique": "ties"}
    assert run.data.metrics == {"pr_mean": 97.2}
    assert {key: run.data.tags[key] for key in version.tags} == version.tags
    assert version.source.endswith(f"{run.info.run_id}/artifacts/model")
    assert made.uri == f"models:/{entry.model}/1"
    assert made.url == registry.uri


def test_a_pod_never_registers_into_a_database_that_dies_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(RegistryError, match=r"lost with the pod.*MLFLOW_TRACKING_URI"):
        MlflowRegistry(RegistrySpec())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert MlflowRegistry(RegistrySpec()).uri == "http://tracking:5000"


@pytest.mark.parametrize(
    "call", ["create_registered_model", "create_run", "log_batch", "log_artifact", "create_model_version"]
)
def test_an_interrupted_registration_is_completed(
    call: str, registry: MlflowRegistry, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies just after one of the calls; the next attempt goes on with the same run."""

    class Killed(BaseException):
        pass

    original = getattr(registry._client, call)

    def die(*arguments: Any, **keywords: Any) -> None:
        if call != "create_model_version":
            original(*arguments, **keywords)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(registry._client, call, die)
        registry.register(entry)
    assert registry.find(entry.model, entry.recipe_digest) is None
    late = replace(entry, tags={**entry.tags, "pr.low": "97.30"}, metrics={"pr_mean": 90.0})
    made = registry.register(late)
    assert made.created
    [run] = runs_of(registry, entry)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"pr_mean": 90.0}
    assert run.data.tags["automerge.pr.low"] == "97.30"


def test_weights_that_had_arrived_are_not_sent_again(
    registry: MlflowRegistry, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[str] = []
    original = registry._client.log_artifact

    def count(run_id: str, path: str, folder: str) -> None:
        sent.append(Path(path).name)
        original(run_id, path, folder)
        if folder.endswith("onnx"):
            raise OSError("the network went away")

    monkeypatch.setattr(registry._client, "log_artifact", count)
    with pytest.raises(RegistryError, match=r"the network went away; mend it and run `automerge register` again"):
        registry.register(entry)
    assert sent == ["model.safetensors", "low.safetensors", "merged.onnx"]
    [run] = runs_of(registry, entry)
    (Path(run.info.artifact_uri.removeprefix("file://")) / "model/weights/model.safetensors").write_bytes(b"half")
    sent.clear()
    monkeypatch.setattr(registry._client, "log_artifact", lambda *a: (sent.append(Path(a[1]).name), original(*a)))
    made = registry.register(entry)
    assert "model.safetensors" in sent  # only half of it had arrived
    assert "low.safetensors" not in sent
    fetched = registry.download(entry.model, made.version, tmp_path / "fetched")
    assert (fetched / "weights" / "model.safetensors").read_bytes() == bytes(range(256))


class Unlocked(MlflowRegistry):
    """As on a server, where nothing keeps two processes apart."""

    @contextmanager
    def _lock(self) -> Iterator[None]:
        yield


def test_the_older_version_wins_a_race_between_two_that_do_not_see_each_other(
    database: str, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other registers between our check and our version."""
    ours, other = Unlocked(RegistrySpec(uri=database)), Unlocked(RegistrySpec(uri=database))
    original = ours._complete_run

    def be_slow(entry: RegistryEntry) -> str:
        run = original(entry)
        other._client.set_tag(run, "automerge.recipe", "hidden")  # the other makes a run of its own
        winner.append(other.register(entry))
        return run

    winner: list[Any] = []
    monkeypatch.setattr(ours, "_complete_run", be_slow)
    made = ours.register(entry)
    assert winner[0].created
    assert made == winner[0].model_copy(update={"created": False})
    [version] = ours._client.search_model_versions(f"name = '{entry.model}'")
    [run] = runs_of(ours, entry)  # the loser's is deleted
    assert run.info.run_id == version.run_id


@pytest.mark.parametrize("call", ["log_batch", "set_terminated", "create_model_version"])
def test_a_run_that_is_deleted_by_the_one_it_is_shared_with(
    call: str, database: str, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process completes our run, finds that a third was first, and deletes the run under our hands."""
    ours, other, third = (Unlocked(RegistrySpec(uri=database)) for _ in range(3))
    original = getattr(ours._client, call)
    winner: list[Any] = []

    def be_slow(*arguments: Any, **keywords: Any) -> Any:
        if not winner:
            [run] = runs_of(ours, entry)
            third._client.set_tag(run.info.run_id, "automerge.recipe", "hidden")  # the third makes a run of its own
            winner.append(third.register(entry))
            other._client.delete_run(run.info.run_id)
        return original(*arguments, **keywords)

    monkeypatch.setattr(ours._client, call, be_slow)
    made = ours.register(entry)
    assert winner[0].created
    assert made == winner[0].model_copy(update={"created": False})
    [version] = ours._client.search_model_versions(f"name = '{entry.model}'")
    assert str(version.version) == made.version


SCRIPT = """
import json, sys
from pathlib import Path
from automerge.registry.mlflow import MlflowRegistry
from automerge.registry.registry import RegistryEntry
from automerge.spec import RegistrySpec
folder = Path(sys.argv[1])
entry = RegistryEntry("digits", "d" * 64, folder / "merged", [folder / "merged.onnx"], [folder / "recipe.json"])
print(MlflowRegistry(RegistrySpec()).register(entry).model_dump_json())
import os
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""


def test_processes_that_start_at_once_on_no_database_yet_make_one_version_in_silence(
    entry: RegistryEntry, tmp_path: Path
) -> None:
    """The default place is the working folder; MLflow's own messages do not reach the user."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(entry.weights.parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [err for _, err in answers] == ["", ""]
    versions = [json.loads(out) for out, _ in answers]
    assert sorted(version["created"] for version in versions) == [False, True]
    assert {version["version"] for version in versions} == {"1"}
    assert {version["url"] for version in versions} == {f"sqlite:///{tmp_path}/mlflow.db"}
    assert (tmp_path / "mlartifacts").is_dir()


def test_address_comes_from_spec_then_environment_then_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert MlflowRegistry(RegistrySpec()).uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert MlflowRegistry(RegistrySpec()).uri == "http://tracking:5000"
    assert MlflowRegistry(RegistrySpec(uri="https://other")).uri == "https://other"
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed


@pytest.mark.parametrize("uri", ["ftp://host", "/some/folder", "file:///mlruns", "host:5000"])
def test_an_address_that_mlflow_cannot_register_at_is_refused(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"registry\.uri: .* is no address"):
        MlflowRegistry(RegistrySpec(uri=uri))


def test_a_server_that_does_not_answer_is_said_soon(entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{port}")
    registry = MlflowRegistry(RegistrySpec())
    start = time.monotonic()
    with pytest.raises(RegistryError) as caught:
        registry.register(entry)
    assert time.monotonic() - start < 10
    assert str(caught.value) == (
        f"MLflow at http://127.0.0.1:{port}: cannot register {entry.model!r}: the server does not answer; "
        "start it, or correct registry.uri or MLFLOW_TRACKING_URI"
    )


def test_retries_are_bounded_unless_the_user_says_otherwise() -> None:
    code = (
        "from automerge.registry.mlflow import MlflowRegistry; from automerge.spec import RegistrySpec; import os;"
        "MlflowRegistry(RegistrySpec(uri='http://host'));"
        "from mlflow import environment_variables as e;"
        "print(e.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), e.MLFLOW_HTTP_REQUEST_TIMEOUT.get())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "7"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "7"], done.stderr


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("something of mine")
    with pytest.raises(RegistryError, match="not an SQLite database"):
        MlflowRegistry(RegistrySpec(uri=f"sqlite:///{path}")).find("digits", "0" * 64)
    assert path.read_text() == "something of mine"


def test_a_database_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(RegistryError, match="cannot be opened"):
        MlflowRegistry(RegistrySpec(uri=f"sqlite:///{tmp_path}/mlflow.db")).find("digits", "0" * 64)


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "mlflow" or name.startswith("mlflow.")]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "mlflow":
                raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"automerge-models\[registry\]"):
        MlflowRegistry(RegistrySpec())


def test_the_spec_chooses_the_registry(database: str) -> None:
    spec = parse_spec(
        json.dumps(
            {
                "name": "digits",
                "model": {"kind": "factory", "target": "m:f"},
                "sources": [{"name": "a", "uri": "a"}, {"name": "b", "uri": "b"}],
                "tasks": [{"name": "t", "kind": "classification", "specialist": "a", "validation": "v", "test": "t"}],
                "registry": {"uri": database},
            }
        )
    )
    registry = load_registry(spec)
    assert isinstance(registry, MlflowRegistry)
    assert registry.find("digits", "0" * 64) is None
