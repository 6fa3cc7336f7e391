"""Looks at all that has to say the same before a version is published; one line for each thing that does not.

Usage: TAG=v1.2.3 REPOSITORY=https://github.com/owner/name python .ci/check_release.py, with what is published in dist/.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PLATFORMS = ("manylinux_*_x86_64", "manylinux_*_aarch64", "macosx_*_arm64", "any")


def problems(root: Path, tag: str, repository: str) -> list[str]:
    """What is wrong, one line each.

    Args:
        root: the repository's folder.
        tag: name of the tag.
        repository: address of the repository in which the tag is.
    """
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    version = _first(r'^version = "(.+)"', project)
    addresses = sorted(set(re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", project)))
    changes = _first(r"^## (.+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    cited = _first(r"^version: (.+)", (root / "CITATION.cff").read_text(encoding="utf-8"))
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml says version {version}")
    if changes != version:
        found.append(f"CHANGELOG.md begins with {changes!r}, not with {version!r}")
    if cited != version:
        found.append(f"CITATION.cff says version {cited}, and pyproject.toml {version}")
    if addresses != [repository]:
        found.append(f"pyproject.toml says that the repository is {' and '.join(addresses)}, and it is {repository}")
    files = [f"slablm-{version}.tar.gz", *(f"slablm-{version}-py3-none-{platform}.whl" for platform in PLATFORMS)]
    found += [f"dist/ has no {name}" for name in files if not any((root / "dist").glob(name))]
    return found


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else "nothing"


if __name__ == "__main__":
    wrong = problems(Path(__file__).resolve().parents[1], os.environ["TAG"], os.environ["REPOSITORY"])
    sys.exit("\n".join(wrong))
