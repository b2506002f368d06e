"""Writes the chart's generated files and ``docs/metrics.md``: ``python -m helm.generate [--check]``."""

import argparse
import json
import sys
from pathlib import Path

import yaml

from helm.dashboard import dashboard
from helm.metrics_reference import metrics_reference
from helm.readme import readme
from helm.values_schema import values_schema

CHART = Path(__file__).with_name("automerge")
METRICS_PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def generated() -> dict[Path, str]:
    """The text that each generated file should have."""
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text(encoding="utf-8"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    return {
        CHART / "README.md": readme(CHART),
        CHART / "values.schema.json": json.dumps(values_schema(alerts), indent=1) + "\n",
        CHART / "files" / "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        METRICS_PAGE: metrics_reference(METRICS_PAGE),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write what is out of date, or only say so; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helm.generate", description="Write the chart's generated files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, wanted in generated().items():
        if path.exists() and path.read_text(encoding="utf-8") == wanted:
            continue
        stale += 1
        if check:
            print(f"{path}: out of date; run: make chart", file=sys.stderr)
        else:
            path.write_text(wanted, encoding="utf-8")
            print(path)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
