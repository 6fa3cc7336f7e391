"""Settings of the documentation site: `make docs` builds it with every warning an error.

Pages are the Markdown files beside this one, as they can be read in the repository too. So links out of this folder
lead to the repository's own pages, and formulas become MathML, which browsers show without any script.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomllib
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "slablm"
author = "The slablm authors"
copyright = author
release = PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
# What has its own documentation elsewhere, or is described in words where it is used.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|typing|collections|pathlib|optional|Tensor|PreTrained).*"),
    ("py:class", r"Progress|Spec|slablm\.(checkpoint|config\.Pattern|dense|packing|system)\b.*"),
    ("py:class", r"slablm\.(methods\.(results|rotation)|planning\.(checks|timing))\..*"),
    ("py:class", r"slablm\.methods\.decomposition\.Made"),
]

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_baseurl = PROJECT["urls"]["Documentation"]
html_title = f"slablm {release}"
html_static_path = ["_static"]
html_css_files = ["slablm.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Files of the repository that are pages of the site as well.
_PAGES = {"README.md": "index.md", "FORMAT.md": "format.md", "CHANGELOG.md": "changelog.md"}


def relinked(text: str, folder: Path, page: str) -> str:
    """A page's text, with links to files that are no pages leading to the repository; a warning where there is no file.

    Args:
        text: Markdown, whose links are relative to its file.
        folder: where that file is.
        page: name of the page, for the warning.
    """

    def replaced(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        name, anchor = path.relative_to(ROOT).as_posix(), link[2] or ""
        if not path.exists():
            logging.getLogger(__name__).warning("link to a file that is not there: %s", name, location=page)
        if path.is_relative_to(HERE) or name in _PAGES:
            return f"]({_PAGES.get(name) or path.relative_to(HERE).as_posix()}{anchor})"
        return f"]({REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{name}{anchor})"

    return _LINK.sub(replaced, text)


def relink_page(app: Sphinx, page: str, text: list[str]) -> None:
    """On reading a page."""
    text[0] = relinked(text[0], HERE, page)


def relink_included(app: Sphinx, path: Path, page: str, text: list[str]) -> None:
    """On including a file of the repository in a page."""
    text[0] = relinked(text[0], (HERE / path).parent, page)


def write_inline(writer: Any, node: nodes.math) -> None:
    """A formula in a line of text."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def write_block(writer: Any, node: nodes.math_block) -> None:
    """A formula on lines of its own."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def write_llms_txt(app: Sphinx, failure: Exception | None) -> None:
    """llms.txt, for programs that read: every page as Markdown, with the file of the repository where it is one."""
    if failure or app.builder.name != "html":
        return
    lines = [f"# {project}", "", f"> {PROJECT['description']}", ""]
    for page in ["index", *app.env.toctree_includes["index"]]:
        text = (HERE / f"{page}.md").read_text(encoding="utf-8")
        file = f"_sources/{page}.md.txt"
        if included := re.match(r"```\{include\} (.+)", text):
            Path(app.outdir, file).write_text((HERE / included[1]).read_text(encoding="utf-8"), encoding="utf-8")
        lines.append(f"- [{app.env.titles[page].astext()}]({html_baseurl}{file})")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", write_llms_txt)
    app.connect("source-read", relink_page)
    app.connect("include-read", relink_included)
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
