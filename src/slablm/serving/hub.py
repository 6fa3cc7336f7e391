"""Uploading a finished folder to the Hugging Face hub.

The files go up as they lie in the folder, through the one call of huggingface_hub that is made for large folders: after
an interruption the same command goes on, and what has arrived is not sent again. What would fail in the end is found
out first, without changing anything: `slablm compress --push-to-hub` asks before hours of work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token

from slablm.checkpoint.card import CARD, FOLDER
from slablm.checkpoint.files import CONFIG
from slablm.checkpoint.inspection import inspect_folder
from slablm.dense.loading import is_compressed, unreachable
from slablm.errors import SlabError
from slablm.system.memory import human_bytes

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_HIDDEN = [".*", "*/.*"]
# Of an earlier upload there may be more files: a model in three shards must not lie beside one in two.
_OLD_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json"]


@dataclass(frozen=True)
class Repository:
    """A place on the hub that this user may write to.

    Attributes:
        name: ``USER/NAME``.
        exists: whether it is there already.
        private: whether others do not see it; of one that is not there, whether it is to be so.
    """

    name: str
    exists: bool
    private: bool


def check_repository(name: str, *, private: bool = False) -> Repository:
    """Make sure that a compressed model can be put under a name; nothing is changed on the hub.

    Args:
        name: ``USER/NAME``, the user's own or that of an organisation.
        private: whether others must not see it.

    Raises:
        SlabError: no such name is possible; no token, or one that may not write there; the hub cannot be reached; what
            is there under this name is public and must not be, or is another kind of model.
    """
    user, _, rest = name.partition("/")
    if not user or not rest or "/" in rest:
        raise SlabError(f"{name!r} is no name on the hub: give USER/NAME")
    if get_token() is None:
        raise SlabError("no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _explained(name):
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise SlabError("the token for the hub may only read: log in with one that may write, `hf auth login`")
        try:
            found = api.model_info(name)
        except errors.RepositoryNotFoundError:
            own = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
            if user not in own:
                raise SlabError(f"{name}: {user!r} is none of your names on the hub ({', '.join(own)})") from None
            return Repository(name, exists=False, private=private)
        api.auth_check(name, write=True)
        _check_content(api, name, [file.rfilename for file in found.siblings or []])
    if private and not found.private:
        raise SlabError(f"{name} is public already: make it private in its settings on the hub, or take another name")
    return Repository(name, exists=True, private=bool(found.private))


def push(
    folder: str | Path, name: str, *, private: bool = False, say: Callable[[str], None] = lambda line: None
) -> str:
    """Upload a compressed model with its card; after an interruption, call it again.

    Args:
        folder: a slablm checkpoint; all its files but hidden ones are uploaded.
        name: ``USER/NAME``.
        private: whether others must not see it.
        say: told what is going on, one line at a time.

    Returns:
        The model's address.

    Raises:
        SlabError: `folder` is no checkpoint or damaged; or as in `check_repository`.
    """
    folder = Path(folder)
    inspect_folder(folder)
    repository = check_repository(name, private=private)
    _name_in_card(folder / CARD, name)
    files = _files(folder)
    size = human_bytes(sum(path.stat().st_size for path in files))
    say(f"Uploading {folder} to {name}: {len(files)} files, {size}")
    api = HfApi()
    with _explained(name):
        if not repository.exists:
            # Without --private it is as the user, or the organisation, has it for all new ones.
            api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model compressed by slablm",
            ignore_patterns=list(_HIDDEN),
            delete_patterns=_OLD_WEIGHTS,
        )
    return f"{api.endpoint}/{name}"


def _files(folder: Path) -> list[Path]:
    """The files that `push` uploads."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _check_content(api: HfApi, name: str, files: list[str]) -> None:
    """Refuse to replace another model's weights, say those of the dense one.

    Raises:
        SlabError: there are weights that slablm has not written.
    """
    if not any(file.endswith(_WEIGHTS) for file in files):
        return
    if CONFIG not in files or not is_compressed(str(Path(api.hf_hub_download(name, CONFIG)).parent)):
        raise SlabError(f"{name} on the hub holds a model that slablm has not written: take another name")


def _name_in_card(card: Path, name: str) -> None:
    """Let the card's example load the model from where it will be."""
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if FOLDER in text:
            card.write_text(text.replace(FOLDER, name), encoding="utf-8")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line.

    Raises:
        SlabError: naming the repository and the reason.
    """
    try:
        yield
    except errors.HFValidationError as error:
        raise SlabError(f"{name!r} is no name on the hub: {_line(error)}") from error
    except Exception as error:
        if not (reason := _reason(error)):
            raise
        raise SlabError(f"{name}: {reason}") from error


def _reason(error: Exception) -> str:
    """What keeps us from the hub, and the way out; empty if the error is of another kind."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the hub does not accept the token: log in again with `hf auth login`"
        if status == 403:
            return "the token may not write there: log in with one that may, `hf auth login`"
        return f"the hub failed ({_line(error)}): run the same command again later"
    if unreachable(error):
        return "the hub cannot be reached: check the network and HF_HUB_OFFLINE, then run the same command again"
    if isinstance(error, RuntimeError):  # hf_xet's, which sends large files
        return f"the upload broke off ({_line(error)}): the same command goes on"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
