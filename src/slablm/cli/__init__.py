"""The command line: one file per verb, heavy imports only inside them, so that ``--help`` is instant.

May import: everything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from slablm.cli.bench import bench
from slablm.cli.chat import chat
from slablm.cli.compare import compare
from slablm.cli.compress import compress
from slablm.cli.console import printable
from slablm.cli.demo import demo
from slablm.cli.doctor import doctor
from slablm.cli.eval import evaluate
from slablm.cli.export import export
from slablm.cli.generate import generate
from slablm.cli.inspect import inspect
from slablm.cli.plan import plan
from slablm.cli.push import push
from slablm.cli.serve import serve
from slablm.errors import SlabError

# In the order in which one needs them.
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "compress": compress,
    "inspect": inspect,
    "eval": evaluate,
    "chat": chat,
    "generate": generate,
    "serve": serve,
    "push": push,
    "export": export,
    "bench": bench,
    "compare": compare,
    "doctor": doctor,
}


class Verb(TyperCommand):
    """A command whose usage line names its arguments as the text does: typer may put them in braces.

    Its description is wrapped by the terminal, and not also where the source has its lines.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the usage line."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    name="slablm",
    help="One-shot compression of language models by SLaB: sparse plus low-rank times binary (arXiv 2604.04493).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, function in VERBS.items():
    app.command(name, cls=Verb)(function)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Options in front of the verb."""
    if version:
        from slablm.system.versions import __version__

        typer.echo(f"slablm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: problems the user can solve become one line on stderr and exit status 1."""
    # Reading a GGUF file has a progress bar that only this silences; tqdm looks at it when torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(prog_name="slablm")
    except SlabError as error:
        fail(str(error))
    except OSError as error:  # a path that is too long, of another kind or not allowed; a full disk
        where = f"{error.filename}: " if error.filename else ""
        fail(where + " ".join((error.strerror or str(error)).split()))
    except MemoryError:
        fail("out of memory: use fewer --num-samples (or --max-memory), a shorter --seq-len or a smaller --dtype")
    except RuntimeError as error:
        # torch.OutOfMemoryError on GPUs, a plain RuntimeError from the CPU allocator.
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory: use fewer --num-samples, a shorter --seq-len, a smaller --dtype or --device cpu")


def fail(message: str) -> None:
    """Print one error line and leave with status 1."""
    print(f"slablm: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(1)
