"""``slablm generate``: let a model write."""

from __future__ import annotations

from typing import Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Device, Dtype, Revision, TrustRemoteCode, printable


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue PROMPT greedily and print the text."""
    from slablm.dense import loading
    from slablm.dense.generation import continue_text
    from slablm.dense.loading import quiet_libraries

    quiet_libraries()
    loaded, tokenizer = loading.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    text = continue_text(loaded, tokenizer, prompt, max_new_tokens, chat=chat)
    typer.echo(printable(text, keep="\n\t"))
