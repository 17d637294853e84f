"""Write the software bill of materials of an image: its Python packages and its Debian packages.

``sbom.py PYTHON OUTPUT``: PYTHON is the interpreter of the environment that is described. The Python packages
are cyclonedx-bom's work; what the base image brought is added from dpkg's own list. CycloneDX 1.6, JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DPKG_FORMAT = "${Package}\t${Version}\t${Architecture}\n"


def python_packages(python: str, output: Path) -> dict[str, Any]:
    """The document of an environment, as cyclonedx-bom writes it: no time and no serial number in it."""
    tool = Path(sys.executable).with_name("cyclonedx-py")
    subprocess.run(
        [
            tool,
            "environment",
            "--output-reproducible",
            "--spec-version",
            "1.6",
            "--output-file",
            output,
            python,
        ],
        check=True,
    )
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def debian_packages() -> list[dict[str, Any]]:
    """A component for each installed Debian package."""
    listing = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={DPKG_FORMAT}"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    components = []
    for line in sorted(listing.splitlines()):
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        components.append(
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        )
    return components


def main() -> None:
    python, output = sys.argv[1], Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    document = python_packages(python, output)
    document["components"] += debian_packages()
    output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
