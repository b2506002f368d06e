"""Runs a generated `WorkflowTemplate` as Argo would, without Argo: the part of it that our templates use.

What it does not know is an error, and what a template does not declare is not there: a step sees its own volumes, its
input artifacts and its environment, and leaves only its outputs. How a step's container is run is the caller's choice:
:func:`subprocess_runner` takes a process of this machine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

RunStep = Callable[[str, list[str], dict[str, str], dict[str, Path]], int]
"""Image, command line, environment, and host path by path in the container; returns the exit code."""


@dataclass
class Finished:
    """How a workflow ended.

    Attributes:
        phases: Succeeded, Failed or Skipped, by task; those of a fan-out are numbered. Tasks that never began are left
            out.
        attempts: how often each task was started.
        status: Succeeded or Failed.
        volume: the run's shared volume; None if it has none.
        artifacts: the artifact repository, a folder ``<task>/<artifact>`` for each.
    """

    phases: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    status: str = "Succeeded"
    volume: Path | None = None
    artifacts: Path = Path()


def run_workflow(
    document: Json,
    folder: Path,
    run_step: RunStep,
    *,
    parameters: Mapping[str, str],
    secrets: Mapping[str, Mapping[str, str]],
    config_maps: Mapping[str, Mapping[str, str]],
) -> Finished:
    """Run the workflow of a template with these parameters in an empty folder."""
    return _Workflow(document, folder, run_step, dict(parameters), {"secret": secrets, "configMap": config_maps}).run()


class _Workflow:
    def __init__(
        self,
        document: Json,
        folder: Path,
        run_step: RunStep,
        parameters: dict[str, str],
        sources: Mapping[str, Mapping[str, Mapping[str, str]]],
    ) -> None:
        assert document["kind"] == "WorkflowTemplate"
        self.spec = document["spec"]
        self.templates = {template["name"]: template for template in self.spec["templates"]}
        self.folder, self.run_step, self.sources = folder, run_step, sources
        declared = self.spec["arguments"]["parameters"]
        given = {item["name"]: item["value"] for item in declared if "value" in item} | parameters
        assert set(given) == {item["name"] for item in declared}, "a parameter has no value, or there is no such one"
        self.values = {f"workflow.parameters.{name}": value for name, value in given.items()}
        self.values["workflow.name"] = "run-1"
        self.claims = {}
        for claim in self.spec.get("volumeClaimTemplates", []):
            self.claims[claim["metadata"]["name"]] = folder / "claims" / claim["metadata"]["name"]
        for place in self.claims.values():
            place.mkdir(parents=True)
        self.finished = Finished(artifacts=folder / "artifacts", volume=self.claims.get("workspace"))

    def run(self) -> Finished:
        waiting = list(self.templates[self.spec["entrypoint"]]["dag"]["tasks"])
        while waiting and self.finished.status == "Succeeded":
            ready = [task for task in waiting if all(self._done(name) for name in task.get("dependencies", []))]
            assert ready, f"these wait for each other: {[task['name'] for task in waiting]}"
            for task in ready:
                waiting.remove(task)
                self._run_task(task)
        if "onExit" in self.spec:
            self.values["workflow.status"] = self.finished.status
            code = self._attempts(self.spec["onExit"], self.spec["onExit"], {}, {})
            self.finished.phases[self.spec["onExit"]] = "Failed" if code else "Succeeded"
        return self.finished

    def _done(self, name: str) -> bool:
        return self.finished.phases.get(name) in ("Succeeded", "Skipped")

    def _run_task(self, task: Json) -> None:
        known = {"name", "template", "dependencies", "when", "withParam", "arguments"}
        assert set(task) <= known, set(task) - known
        name = task["name"]
        if "when" in task and not self._holds(task["when"]):
            self.finished.phases[name] = "Skipped"
            return
        items = json.loads(self._filled(task["withParam"], {})) if "withParam" in task else [None]
        failed = False
        for number, item in enumerate(items):
            node = name if item is None else f"{name}({number})"
            arguments = self._filled(task.get("arguments", {}), {} if item is None else {"item": item})
            parameters = {each["name"]: each["value"] for each in arguments.get("parameters", [])}
            artifacts = {each["name"]: self._stored(each["from"]) for each in arguments.get("artifacts", [])}
            code = self._attempts(node, task["template"], parameters, artifacts)
            self.finished.phases[node] = "Failed" if code else "Succeeded"
            failed = failed or code != 0
        self.finished.phases[name] = "Failed" if failed else "Succeeded"
        if failed:
            self.finished.status = "Failed"

    def _attempts(self, node: str, template: str, parameters: dict[str, str], artifacts: dict[str, Path]) -> int:
        """Run a pod until it succeeds or is out of retries; the pauses are left out."""
        retry = self.templates[template].get("retryStrategy", {"limit": "0", "retryPolicy": "Always"})
        assert retry["retryPolicy"] == "Always"
        code = 1
        for attempt in range(int(retry["limit"]) + 1):
            self.finished.attempts[node] = attempt + 1
            code = self._run_pod(node, template, self.folder / "pods" / f"{node}-{attempt}", parameters, artifacts)
            if code == 0:
                break
        return code

    def _run_pod(
        self, node: str, name: str, folder: Path, parameters: dict[str, str], artifacts: dict[str, Path]
    ) -> int:
        template = self._filled(
            self.templates[name], {f"inputs.parameters.{key}": value for key, value in parameters.items()}
        )
        container = template["container"]
        inputs, outputs = template.get("inputs", {}), template.get("outputs", {})
        assert {each["name"] for each in inputs.get("parameters", [])} == set(parameters)

        mounts: dict[str, Path] = {}
        own = {volume["name"] for volume in template.get("volumes", []) if "emptyDir" in volume}
        for mount in container["volumeMounts"]:
            assert mount["name"] in own | set(self.claims), f"{name} has no volume {mount['name']!r}"
            mounts[mount["mountPath"]] = self.claims.get(mount["name"], folder / "volumes" / mount["name"])
            mounts[mount["mountPath"]].mkdir(parents=True, exist_ok=True)
        for artifact in inputs.get("artifacts", []):
            target = _host_path(artifact["path"], mounts)
            if target is None:  # Argo's own volume
                target = mounts[artifact["path"]] = folder / "inputs" / artifact["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if "raw" in artifact:
                target.write_text(artifact["raw"]["data"], encoding="utf-8")
            else:
                shutil.copytree(artifacts[artifact["name"]], target)

        argv = [*container["command"], *container.get("args", [])]
        assert not re.search(r"\{\{", json.dumps([argv, container["env"]])), "a placeholder was not filled"
        code = self.run_step(container["image"], argv, self._environment(container["env"]), mounts)
        if code != 0:
            return code

        for artifact in outputs.get("artifacts", []):
            source = _host_path(artifact["path"], mounts)
            assert source is not None, f"{artifact['path']} is on no volume, and the root is read-only"
            if not source.exists():
                return 64
            shutil.copytree(source, self.finished.artifacts / node / artifact["name"])
        for parameter in outputs.get("parameters", []):
            source = _host_path(parameter["valueFrom"]["path"], mounts)
            assert source is not None, f"{parameter['valueFrom']['path']} is on no volume"
            if not source.exists():
                return 64
            key = f"tasks.{node}.outputs.parameters.{parameter['name']}"
            self.values[key] = source.read_text(encoding="utf-8").removesuffix("\n")
        return 0

    def _environment(self, entries: list[Json]) -> dict[str, str]:
        environment = {}
        for entry in entries:
            assert entry["name"] not in environment, f"{entry['name']} is there twice"
            if "value" in entry:
                environment[entry["name"]] = entry["value"]
                continue
            ((kind, reference),) = entry["valueFrom"].items()
            source = self.sources[kind.removesuffix("KeyRef")].get(reference["name"], {})
            if reference["key"] in source:
                environment[entry["name"]] = source[reference["key"]]
            else:
                assert reference.get("optional") is True, f"{reference} is missing, so the pod would not start"
        return environment

    def _stored(self, source: str) -> Path:
        """``{{tasks.<task>.outputs.artifacts.<name>}}``, as a folder."""
        found = re.fullmatch(r"\{\{tasks\.([^.]+)\.outputs\.artifacts\.([^.}]+)\}\}", source)
        assert found, source
        return self.finished.artifacts / found[1] / found[2]

    def _holds(self, condition: str) -> bool:
        found = re.fullmatch(r"(\S+) == (\S+)", self._filled(condition, {}))
        assert found, condition
        return found[1] == found[2]

    def _filled(self, value: Any, more: Mapping[str, str]) -> Any:
        """Placeholders replaced as Argo does it: in the JSON text, by the value escaped for JSON."""
        values = {**self.values, **more}

        def fill(found: re.Match[str]) -> str:
            if re.match(r"tasks\.[^.]+\.outputs\.artifacts\.", found[1]):
                return found[0]
            return json.dumps(values[found[1]])[1:-1]

        return json.loads(re.sub(r"\{\{([^{}]+)\}\}", fill, json.dumps(value)))


def _host_path(path: str, mounts: Mapping[str, Path]) -> Path | None:
    """Where a path of the container is on this machine; None if it is on no volume."""
    for mount in sorted(mounts, key=len, reverse=True):
        if path == mount or path.startswith(f"{mount}/"):
            return mounts[mount] / path[len(mount) :].lstrip("/")
    return None


Watch = Callable[[list[str], "subprocess.Popen[bytes]", dict[str, Path]], None]
"""Command line, running process, host path by path in the container."""


def subprocess_runner(folder: Path, *, log: list[list[str]] | None = None, watch: Watch | None = None) -> RunStep:
    """Runs a step's command line as a process of this machine, with the paths of its container replaced.

    The process has the environment of the step and nothing else; its working folder must be empty afterwards.

    Args:
        folder: for the working folder and what the steps print.
        log: gets every command line, before the paths are replaced.
        watch: called when a process has started; it may kill its group.
    """
    path = f"{Path(sys.executable).parent}:{os.defpath}"

    def run(image: str, argv: list[str], environment: dict[str, str], mounts: dict[str, Path]) -> int:
        del image
        if log is not None:
            log.append(argv)
        places = sorted(mounts, key=len, reverse=True)
        pattern = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, places))})(?![\w.-])")

        def here(text: str) -> str:
            return pattern.sub(lambda found: str(mounts[found[1]]), text)

        working, printed = folder / "working", folder / "printed.log"
        working.mkdir(parents=True, exist_ok=True)
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [here(word) for word in argv],
                env={"PATH": path, "OMP_NUM_THREADS": "1", **{key: here(text) for key, text in environment.items()}},
                cwd=working,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if watch is not None:
                    watch(argv, process, mounts)
                code = process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        print(f"$ {' '.join(argv)}\n{printed.read_text(errors='replace')}exit code {code}")
        assert not list(working.iterdir()), "a step wrote to its working folder, and the root is read-only"
        return code

    return run
