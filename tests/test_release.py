"""What is published: versions that agree, files that are all there, workflows that run nothing which can change."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
REPOSITORY = "https://github.com/owner/name"


@pytest.fixture(scope="module")
def problems():
    specification = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.problems


@pytest.fixture
def release(tmp_path):
    """Version 1.2.3, ready to be published."""
    urls = f'[project.urls]\nRepository = "{REPOSITORY}"\nIssues = "{REPOSITORY}/issues"\n'
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "1.2.3"\n{urls}')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3\n\n- All.\n\n## 1.2.2\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "dist").mkdir()
    for platform in (
        "manylinux_2_27_x86_64.manylinux_2_28_x86_64",
        "manylinux_2_28_aarch64",
        "macosx_11_0_arm64",
        "any",
    ):
        (tmp_path / "dist" / f"slablm-1.2.3-py3-none-{platform}.whl").touch()
    (tmp_path / "dist" / "slablm-1.2.3.tar.gz").touch()
    return tmp_path


def test_a_release_is_published_when_all_agrees(problems, release):
    assert problems(release, "v1.2.3", REPOSITORY) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("pyproject.toml", "1.2.3", "1.2.4", "the tag is v1.2.3, and pyproject.toml says version 1.2.4"),
        ("CHANGELOG.md", "## 1.2.3", "## 1.2.3 (unreleased)", "begins with '1.2.3 (unreleased)', not with '1.2.3'"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", "CITATION.cff says version 1.2.2"),
        (
            "pyproject.toml",
            "owner/name/issues",
            "other/name/issues",
            "is https://github.com/other/name and https://github.com/owner/name",
        ),
    ],
)
def test_what_disagrees_is_named(problems, release, file, old, new, line):
    path = release / file
    path.write_text(path.read_text().replace(old, new))
    assert line in "\n".join(problems(release, "v1.2.3", REPOSITORY))


@pytest.mark.parametrize("name", ["*.tar.gz", "*x86_64.whl", "*aarch64.whl", "*arm64.whl", "*any.whl"])
def test_a_file_that_is_missing_is_named(problems, release, name):
    next((release / "dist").glob(name)).unlink()
    assert [line.startswith("dist/ has no slablm-1.2.3") for line in problems(release, "v1.2.3", REPOSITORY)] == [True]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_pinned_and_what_anyone_can_run(path):
    """Actions by digest with their version beside it; commands are targets of the Makefile; no rights by default."""
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for action in re.findall(r"uses: (?!\./)(.+)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for command in re.findall(r"run: (.+)", text):
        names = (
            [row["target"] for row in workflow["jobs"]["make"]["strategy"]["matrix"]["include"]]
            if "matrix" in command
            else [command.split()[1]]
        )
        assert command.startswith("make ")
        assert set(names) <= targets, command
