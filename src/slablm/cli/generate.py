"""``slablm generate``: let a model write."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Device, Dtype, Revision, TrustRemoteCode, next_step, printable, say
from slablm.errors import SlabError


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; without it, it is read from stdin.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.WritingSeed = None,
    stop: options.Stop = None,
    kv_cache: options.KvCache = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue PROMPT, or answer it with --chat, and print the text as it is written; the timing goes to stderr."""
    from slablm.dense import loading
    from slablm.serving.writing import Sampling, chat_ids, check_text, prompt_ids, write

    sampling = Sampling(max_new_tokens, temp, top_p, seed, tuple(stop or ()), kv_cache)
    if prompt is None:
        prompt = _from_stdin()
    check_text(prompt, "the prompt")
    loading.quiet_libraries()
    loaded, tokenizer = loading.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    if chat:
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = prompt_ids(tokenizer, prompt)
        show(prompt)
    written = write(loaded, tokenizer, ids, sampling, show)
    typer.echo()
    say(written.timing())
    next_step("slablm", "serve", model)


def show(text: str) -> None:
    """Print a piece of a model's text at once."""
    sys.stdout.write(printable(text, keep="\n\t"))
    sys.stdout.flush()


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise SlabError("no prompt: give it as PROMPT, or on stdin")
    return sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape").removesuffix("\n")
