"""The images under a real Docker Engine (Debian: docker.io), as a careful cluster would run them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from automerge.preservation import Evaluation
from automerge.searching.store import read_log
from automerge.stages.documents import Registration
from tests.e2e.tiny import TinyPair, tiny_spec
from tests.system.images import REVISION, ROOT, SOURCE, UID, VERSION, Images, make

pytestmark = [pytest.mark.system, pytest.mark.images, pytest.mark.timeout(1200)]

BOTH = pytest.mark.parametrize("image", ["automerge", "trigger"])
LARGEST_MB = {"automerge": 2000, "trigger": 400}

# All that could build, install or be left of it; what Debian's own interpreter brings is not ours.
LEFT_BEHIND = """
for tool in gcc g++ cc c++ clang zig as ld make cmake; do command -v $tool; done
find / -xdev \\( -name '*.whl' -o -name 'ziglang*' -o -name '*.a' \\) -print | grep -v ^/usr/share/python-wheels/
find /opt/automerge -maxdepth 5 \\( -name pip -o -name cyclonedx \\)
find /root/.cache /tmp /var/cache/apt /var/lib/apt/lists -type f 2>/dev/null
find / -xdev -type d -path '*cache*/pip' 2>/dev/null
true
"""


def name_of(images: Images, image: str) -> str:
    return str(getattr(images, image))


def inspected(images: Images, image: str) -> dict[str, Any]:
    (found,) = json.loads(images.engine.docker("image", "inspect", name_of(images, image)).stdout)
    return dict(found)


def bill(images: Images, image: str) -> dict[str, Any]:
    text = images.engine.run(name_of(images, image), "sh", "-c", "cat /usr/share/automerge/sbom.json").stdout
    return dict(json.loads(text))


@BOTH
def test_the_command_runs_without_a_name_a_network_a_privilege_or_a_root_to_write_to(
    images: Images, image: str
) -> None:
    run = images.engine.run
    assert run(name_of(images, image), "--version").stdout == f"automerge, version {VERSION}\n"
    assert run(name_of(images, image)).stdout.startswith("Usage: automerge")
    assert run(name_of(images, image), "sh", "-c", "id -u; id -g; id -un").stdout.split() == [
        str(UID),
        str(UID),
        "automerge",
    ]
    capabilities = run(name_of(images, image), "sh", "-c", "grep Cap /proc/self/status; touch ~/x /tmp/y").stdout
    assert {line.split()[1] for line in capabilities.splitlines()} == {"0" * 16}
    refused = run(name_of(images, image), "sh", "-c", "touch /opt/automerge/x /x", check=False)
    assert refused.returncode != 0
    assert refused.stderr.count("Read-only file system") == 2


@BOTH
def test_the_user_is_a_number_that_owns_nothing(images: Images, image: str) -> None:
    """A number, so that a cluster's `runAsNonRoot` can tell."""
    assert inspected(images, image)["Config"]["User"] == f"{UID}:{UID}"
    owned = f"find / -xdev -path /proc -prune -o \\( -user {UID} -o -group {UID} -o -perm -0002 ! -type l \\) -print"
    found = images.engine.run(name_of(images, image), "sh", "-c", f"{owned} 2>/dev/null; true").stdout.split()
    assert [path for path in found if not path.startswith(("/tmp", "/var/tmp", "/dev/", "/run/lock"))] == []


@BOTH
def test_nothing_is_left_of_the_build(images: Images, image: str) -> None:
    options = ("--user", "0", "--cap-add", "DAC_READ_SEARCH")  # to see all of it
    found = images.engine.run(name_of(images, image), "sh", "-c", LEFT_BEHIND, options=options)
    assert found.stdout == ""


@BOTH
def test_neither_configuration_nor_history_tells_where_packages_came_from(images: Images, image: str) -> None:
    configuration = json.dumps(inspected(images, image))
    history = images.engine.docker("history", "--no-trunc", name_of(images, image)).stdout
    for text in (configuration, history):
        assert images.wheels not in text
        assert "PIP_" not in text


@BOTH
def test_labels(images: Images, image: str) -> None:
    labels = inspected(images, image)["Config"]["Labels"]
    prefix = "org.opencontainers.image."
    found = {key.removeprefix(prefix): value for key, value in labels.items() if key.startswith(prefix)}
    assert found.pop("description")
    assert found == {
        "title": "automerge" if image == "automerge" else "automerge-trigger",
        "version": VERSION,
        "revision": REVISION,
        "source": SOURCE,
        "licenses": "Apache-2.0",
        "base.name": "python:3.11-slim-bookworm",
    }


@BOTH
def test_the_bill_of_materials_lists_what_is_installed(images: Images, image: str) -> None:
    components = bill(images, image)["components"]
    python = {
        part["name"].lower().replace("_", "-"): part["version"]
        for part in components
        if part.get("purl", "").startswith("pkg:pypi/") or part["name"] == "automerge-models"
    }
    script = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(images.engine.run(name_of(images, image), "python", "-c", script).stdout)
    assert python == {name.lower().replace("_", "-"): number for name, number in installed.items()}
    assert python["automerge-models"] == VERSION
    debian = {part["name"] for part in components if part.get("purl", "").startswith("pkg:deb/debian/")}
    assert {"libc6", "ca-certificates"} <= debian


@BOTH
def test_what_is_pinned_is_installed_at_its_pin(images: Images, image: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    found = {part["name"].lower(): part["version"].split("+")[0] for part in bill(images, image)["components"]}
    assert {name: found[name] for name in pins if name in found} == {name: pins[name] for name in pins if name in found}
    assert found["kfp"] == pins["kfp"]
    assert ("torch" in found) == (image == "automerge")


@BOTH
def test_sizes(images: Images, image: str) -> None:
    size = inspected(images, image)["Size"] / 1e6
    print(f"{name_of(images, image)}: {size:.0f} MB")
    assert size < LARGEST_MB[image]


def test_a_change_of_our_code_changes_only_the_last_layer(images: Images) -> None:
    """The packages, almost all of the image, are one layer; what we add is another, small one."""
    lines = images.engine.docker("history", "--format", "{{.Size}}", "--human=false", images.automerge).stdout.split()
    sizes = [int(size) for size in lines if int(size) > 0]
    assert sizes[0] < 20e6
    assert sizes[1] > 500e6


def test_a_whole_merge_without_a_network(images: Images, pair: TinyPair, tmp_path: Path) -> None:
    """The same container as on a cluster's GPU node, where `device: auto` would take the GPU."""
    registry = "sqlite:////work/mlflow.db"
    spec = tiny_spec("/inputs", registry, compute={"device": "auto", "threads": 1})
    document = spec.model_dump(mode="json", exclude_defaults=True)
    document["model"]["python_path"] = ["/code"]
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    for key in pair.keys:
        shutil.copyfile(pair.folder / key, inputs / key)  # its own are for our eyes only
    work.mkdir()
    work.chmod(0o777)
    (work / "spec.yaml").write_text(yaml.safe_dump(document))
    code = ROOT / "tests/e2e/tiny.py"
    mounts = (f"{inputs}:/inputs:ro", f"{code}:/code/tiny.py:ro", f"{work}:/work")
    options = tuple(part for mount in mounts for part in ("--volume", mount))
    done = images.engine.run(images.automerge, "run", "/work/spec.yaml", "--output", "/work/run", options=options)
    assert "Traceback" not in done.stdout + done.stderr
    assert Evaluation.read(work / "run/evaluate/evaluation.json").gate.verdict == "pass"
    registration = work / "run/register/registration.json"
    assert Registration.read(registration).registered.version == "1"
    assert registration.stat().st_uid == UID
    header, _, _ = read_log(work / "run/search/trials.jsonl")
    assert header.hardware.startswith("cpu")


@pytest.mark.parametrize("package", ["torch", "safetensors", "numpy"])
def test_the_trigger_has_nothing_that_runs_models(images: Images, package: str) -> None:
    done = images.engine.run(images.trigger, "python", "-c", f"import {package}", check=False)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def test_the_trigger_compiles_the_pipeline(images: Images) -> None:
    script = "import automerge_pipelines.settings, automerge_pipelines.merge_pipeline, automerge_components, fastapi"
    images.engine.run(images.trigger, "python", "-c", script)


def test_a_command_that_runs_models_says_what_the_trigger_lacks(images: Images) -> None:
    options = ("--volume", f"{ROOT / 'examples/digits/spec.yaml'}:/spec.yaml:ro")
    done = images.engine.run(images.trigger, "validate", "/spec.yaml", options=options, check=False)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: torch is not installed; ")


BUILD = ("build", "--network", "host", "--file", "docker/Dockerfile", "--build-arg", "PIP_FIND_LINKS")


def test_the_cuda_variant_is_not_built_from_a_cpu_build_of_torch(images: Images) -> None:
    command = [images.engine.program, *BUILD, "--build-arg", "VARIANT=cuda", "."]
    said = make(command, images.engine, images.wheels, check=False)
    assert "VARIANT is cuda, but pip found the cpu build of torch" in said


def test_what_the_cuda_variant_adds(images: Images) -> None:
    """Its last stage, on top of the packages for CPUs: no other can be had here."""
    make([images.engine.program, *BUILD, "--target", "cuda", "--tag", "cuda-stage", "."], images.engine, images.wheels)
    (found,) = json.loads(images.engine.docker("image", "inspect", "cuda-stage").stdout)
    assert found["Config"]["User"] == f"{UID}:{UID}"
    added = set(found["Config"]["Env"]) - set(inspected(images, "automerge")["Config"]["Env"])
    assert added == {
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    }
