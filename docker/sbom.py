"""Writes an image's bill of materials: the Python packages of an environment and the Debian packages below it.

CycloneDX 1.6 as JSON, checked against its schema. Runs in the image's build, beside cyclonedx-bom:
``python sbom.py /opt/automerge/bin/python sbom.json``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def python_packages(interpreter: str) -> dict[str, Any]:
    """The bill of an environment, given by its interpreter."""
    options = ["--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON"]
    command = [sys.executable, "-m", "cyclonedx_py", "environment", *options, interpreter]
    bill: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return bill


def debian_packages() -> list[dict[str, str]]:
    """The components of the base image."""
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n"]
    lines = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    components = []
    for name, version, architecture in (line.split() for line in lines):
        url = PackageURL("deb", "debian", name, version, {"arch": architecture}).to_string()
        components.append({"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url})
    return components


def main(interpreter: str, target: Path) -> None:
    """Write the bill to ``target``."""
    bill = python_packages(interpreter)
    bill["components"] += debian_packages()
    text = json.dumps(bill, indent=1, sort_keys=True)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        sys.exit(f"{target}: the bill of materials breaks CycloneDX's schema: {problem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
