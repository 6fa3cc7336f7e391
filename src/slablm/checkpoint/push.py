"""Uploading a compressed model while it is saved: the finished files, as they lie in the folder.

transformers uploads in the middle of its `save_pretrained`, before the guard is in `config.json` and the headers are
sealed. So the steps are taken here, in its order and with its own functions: the repository first (who may not write
there learns it before anything is saved), the files last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `PreTrainedModel.save_pretrained` takes for itself; all else is for the hub.
_SAVING = ("max_shard_size", "variant", "save_peft_format", "save_original_format", "distributed_checkpoint")
_COMMITTING = ("commit_message", "commit_description", "create_pr", "revision")
_CARD = "README.md"


def prepare(model: PreTrainedModel, out: Path, kwargs: dict[str, Any]) -> Callable[[Collection[str]], None]:
    """Create the repository.

    Args:
        model: the compressed model.
        out: the folder that it is saved to.
        kwargs: of `save_pretrained`; what is for the hub is taken out.

    Returns:
        What uploads files of `out`, by their names.
    """
    from transformers.utils import hub

    options = {key: kwargs.pop(key) for key in list(kwargs) if key not in _SAVING}
    commit = {key: options.pop(key) for key in _COMMITTING if key in options}
    token = options.get("token")
    repository: str = hub.hf_api().create_repo(options.pop("repo_id", out.name), exist_ok=True, **options).repo_id

    def upload(names: Collection[str]) -> None:
        if not (out / _CARD).exists():
            card = hub.create_and_tag_model_card(repository, model.model_tags, token=token)
            card.save(out / _CARD)
        wanted = {*names, _CARD}
        # To transformers a file is old unless it has changed since the time given here.
        old = {path.name: float("inf") for path in out.iterdir() if path.name not in wanted}
        model._upload_modified_files(out, repository, old, token=token, **commit)

    return upload
