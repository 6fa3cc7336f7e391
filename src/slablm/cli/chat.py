"""``slablm chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from slablm.cli import options
from slablm.cli.console import Device, Dtype, Revision, TrustRemoteCode, next_step, say
from slablm.cli.generate import show
from slablm.errors import SlabError

if TYPE_CHECKING:
    from slablm.serving.conversation import Conversation
    from slablm.serving.writing import Written

_HELP = """\
/reset           begin anew, with the same instruction
/system TEXT     begin anew, with an instruction to the model; without TEXT, with none
/help            these lines
/exit            the end (as Ctrl-D)
\"\"\"              begins and ends a text of several lines; a \\ at the end of a line continues it
Ctrl-C           ends an answer"""
_FENCE = '"""'


def chat(
    model: options.Model,
    system: Annotated[str, typer.Option(help="Instruction to the model, in front of the conversation.")] = "",
    max_new_tokens: options.MaxNewTokens = 512,
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
    """Talk with a model. /help lists what can be typed besides text."""
    from slablm.dense import loading
    from slablm.serving.conversation import Conversation
    from slablm.serving.writing import Sampling

    sampling = Sampling(max_new_tokens, temp, top_p, seed, tuple(stop or ()), kv_cache)
    loading.quiet_libraries()
    loaded, tokenizer = loading.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    conversation = Conversation(loaded, tokenizer, sampling, system)
    if sys.stdin.isatty():
        with suppress(ImportError):  # input() has a history and line editing with it
            import readline  # noqa: F401
        say(f"{model}: /help for help, Ctrl-D to leave")
    _summarise(_talk(conversation))
    next_step("slablm", "serve", model)


def _talk(conversation: Conversation) -> list[Written]:
    """Read, do and answer until the input ends; the answers."""
    answers = []
    while (text := _read()) is not None:
        text = text.strip()
        try:
            if text == "/exit":
                break
            if text.startswith("/"):
                _obey(conversation, text)
            elif text:
                answers.append(conversation.ask(text, show))
                typer.echo()
                say(answers[-1].timing())
        except SlabError as error:
            say(f"error: {error}")
    return answers


def _obey(conversation: Conversation, command: str) -> None:
    verb, _, text = command.partition(" ")
    if verb == "/reset":
        conversation.reset(conversation.system)
        say("the conversation begins anew")
    elif verb == "/system":
        conversation.reset(text.strip())
        say(
            "the conversation begins anew, with this instruction" if text else "the conversation begins anew, with none"
        )
    elif verb == "/help":
        for line in _HELP.splitlines():
            say(line)
    else:
        raise SlabError(f"{verb} is no command: /help lists them")


def _read() -> str | None:
    """What the user says, in one line or several; None at the end."""
    lines: list[str] = []
    fenced = False
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except KeyboardInterrupt:  # forget what was typed
            say("")
            return ""
        except EOFError:
            return "\n".join(lines) if lines else None
        if not lines and line.lstrip().startswith(_FENCE):
            fenced, line = True, line.lstrip().removeprefix(_FENCE)
        if fenced and line.rstrip().endswith(_FENCE):
            return "\n".join([*lines, line.rstrip().removesuffix(_FENCE)])
        if not fenced and not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line if fenced else line.removesuffix("\\"))


def _summarise(answers: list[Written]) -> None:
    """One line about the whole conversation."""
    from slablm.system.memory import human_bytes, peak_resident_bytes, resident_bytes

    decoded, seconds = sum(max(0, len(a.tokens) - 1) for a in answers), sum(a.seconds for a in answers)
    parts = [f"{len(answers)} answers, {sum(len(a.tokens) for a in answers)} tokens"]
    if seconds > 0:
        parts.append(f"{decoded / seconds:.1f} tokens/s")
    memory, peak = resident_bytes(), peak_resident_bytes()
    if memory is not None and peak is not None:
        parts.append(f"memory {human_bytes(memory)}, at most {human_bytes(peak)}")
    say(", ".join(parts))
