"""The demo: two real digit classifiers become one, from S3 to the registry, by the pipeline that runs on a cluster.

Trains a base and two specialists (once; later runs reuse them), starts an S3 server on this machine, uploads them, runs
the Kubeflow pipeline under its local runner, and registers the result in MLflow on SQLite. Everything is below
``.demo``; nothing is left running.
"""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from automerge.errors import AutoMergeError  # noqa: E402
from automerge.preservation import Evaluation  # noqa: E402
from automerge.report.console import print_evaluation  # noqa: E402
from automerge.spec import load_spec  # noqa: E402
from automerge.stages.documents import EVALUATION, REGISTRATION, Registration  # noqa: E402
from automerge.storage import upload  # noqa: E402
from automerge.testing.s3_server import running_s3  # noqa: E402
from automerge_pipelines.local import run_local  # noqa: E402
from digits.train import prepare  # noqa: E402

FOLDER = ROOT / ".demo"


def main() -> int:
    """Run the demo; returns the exit code."""
    start = time.monotonic()
    print("1. Two specialists: a small transformer learns ten digits, then one copy 0-4 and one copy 5-9", flush=True)
    prepared = prepare(FOLDER / "models")
    print("   reused from an earlier run" if prepared.reused else f"   trained in {time.monotonic() - start:.0f} s")
    with ExitStack() as stack:
        print("2. An S3 server on this machine; checkpoints and data are uploaded", flush=True)
        server = stack.enter_context(running_s3(FOLDER / "s3"))
        os.environ.update(server.environment)
        destination = f"s3://{server.bucket}/digits"
        for path in (prepared.base, *prepared.sources.values()):
            upload(path, f"{destination}/{path.name}")
        upload(FOLDER / "models" / "data", f"{destination}/data")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{FOLDER / 'mlflow.db'}"
        spec = load_spec(Path(__file__).with_name("spec.yaml"), {"DIGITS": destination})
        print(
            f"3. The pipeline: fetch, segment, search and merge ({spec.search.trials} trials), evaluate, register",
            flush=True,
        )
        run = run_local(spec, FOLDER / "runs", echo=sys.stdout)

    evaluation = Evaluation.read(run.evaluation / EVALUATION)
    print()
    print_evaluation(evaluation, run.report)
    if evaluation.onnx.max_abs_difference is not None:
        print(f"onnx:   exported; differs from torch by at most {evaluation.onnx.max_abs_difference:.1e}")
    if run.registration is None:
        return 3
    version = Registration.read(run.registration / REGISTRATION).registered
    state = "registered" if version.created else "registered before, the same recipe"
    print(f"model:  {version.model} version {version.version} in MLflow ({state})")
    print(f"\nDone in {time.monotonic() - start:.0f} s. What to try next:")
    print(f"  open the report          {run.report}")
    print(f"  look into the registry   .venv/bin/mlflow ui --backend-store-uri sqlite:///{FOLDER / 'mlflow.db'}")
    print(
        "  change the job           examples/digits/spec.yaml (trials, techniques, granularity), then make demo again"
    )
    print("  write your own           .venv/bin/automerge init my-merge.yaml")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AutoMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
