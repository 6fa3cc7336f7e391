"""``slablm push``: a compressed model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slablm.cli.console import Json, echo, next_step, print_json, say


def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A slablm checkpoint folder.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="The model's name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only you, or your organisation, can see it.")] = False,
    json: Json = False,
) -> None:
    """Upload OUT with its card to the Hugging Face hub. After an interruption, the same command goes on."""
    from slablm.dense.loading import quiet_libraries
    from slablm.serving import hub

    quiet_libraries()
    address = hub.push(out, name, private=private, say=say)
    if json:
        print_json({"repository": name, "url": address})
    else:
        echo(address)
        next_step("slablm", "chat", name)
