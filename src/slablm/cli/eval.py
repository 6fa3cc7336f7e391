"""``slablm eval``: perplexity of a dense or compressed model."""

from __future__ import annotations

from typing import Annotated

import typer

from slablm.cli.console import Device, Dtype, Json, Revision, TrustRemoteCode, print_json, progress


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder (dense or compressed), .gguf file or 'smollm2'.")],
    text: Annotated[str, typer.Option(help="wikitext2, c4, builtin or a text file.")] = "wikitext2",
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure perplexity on non-overlapping windows."""
    from slablm import loading
    from slablm.calibration.text import check_length, load_text, windows_from_text
    from slablm.cli.console import quiet_libraries
    from slablm.evaluation import perplexity

    num_tokens = None if max_windows is None else max_windows * seq_len
    content = load_text(text, split="evaluation", num_tokens=num_tokens)
    quiet_libraries()
    loaded, tokenizer = loading.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    check_length(loaded, seq_len)
    windows = windows_from_text(content, tokenizer, seq_len, None, f"evaluation text {text}")[:max_windows]
    with progress("Evaluating") as (bar, task):
        result = perplexity(loaded, windows, lambda done, total: bar.update(task, completed=done, total=total))
    if json:
        print_json(
            {
                "perplexity": result.value,
                "stderr": result.stderr,
                "windows": len(result.window_losses),
                "tokens": result.tokens,
            }
        )
    else:
        typer.echo(f"perplexity {result.value:.3f} ± {result.stderr:.3f} ({len(windows)} windows of {seq_len} tokens)")
