"""The house: data flows one way, room to room, and every room says what it is for. The rules are in pyproject.toml."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "slablm"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
# The copy and not the installed package, which an editable installation would find first.
LINT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirect" not in type(finder).__name__]
sys.path.insert(0, ".")
from importlinter.cli import lint_imports
sys.exit(lint_imports())
"""


def lint(folder):
    """Import-linter's verdict on a copy of the package in a folder."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "slablm", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def test_no_arrow_runs_upwards_and_there_is_no_circle(copy):
    verdict = lint(copy)
    assert verdict.returncode == 0, verdict.stdout


@pytest.mark.parametrize(
    ("importer", "imported", "rule"),
    [
        ("system/finite.py", "slablm.cli.console", "A room imports only what its data comes from"),
        ("checkpoint/shards.py", "slablm.dense.sources", "A room imports only what its data comes from"),
        ("system/memory.py", "slablm.system.float32", None),
        ("methods/symbols.py", "slablm.methods.slab_plus", "No circle, between rooms or inside one"),
        ("methods/slab.py", "transformers", "The mathematics knows nothing of transformers, files or devices"),
    ],
)
def test_the_rules_can_fail(copy, importer, imported, rule):
    file = copy / "slablm" / importer
    file.write_text(file.read_text(encoding="utf-8") + f"\nimport {imported}\n", encoding="utf-8")
    verdict = lint(copy)
    assert (f"{rule} BROKEN" if rule else "0 broken") in verdict.stdout


def test_only_the_command_line_enters_through_the_package_itself():
    """`from slablm import …` inside a room would be an arrow to everything at once."""
    own = re.compile(r"^\s*(from slablm import|import slablm$)", re.MULTILINE)
    found = [path for path in PACKAGE.rglob("*.py") if own.search(_code(path))]
    assert not found


def test_every_room_says_what_belongs_there_and_what_it_may_import():
    assert {room.name for room in ROOMS} >= {"system", "methods", "packing", "runtime", "checkpoint", "dense", "cli"}
    for room in ROOMS:
        text = (room / "__init__.py").read_text(encoding="utf-8")
        assert text.startswith('"""'), room.name
        assert "May import" in text.split('"""')[1], room.name


def test_tests_mirror_the_rooms():
    names = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert names <= {room.name for room in ROOMS}


def test_a_file_fits_in_the_head():
    files = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.rglob("*.cu*"),
        *(ROOT / "csrc").glob("*"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in files if path.is_file()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def _code(path):
    """A module's text without its string literals in triple quotes."""
    return re.sub(r'"""(.|\n)*?"""', "", path.read_text(encoding="utf-8"))
