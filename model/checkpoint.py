"""Reading and writing one network's folder: config.json and model.safetensors, and nothing else.

A pickle can run code when it is opened, so none ever is: one that lies in a checkpoint's folder is refused by its name.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.errors import CheckpointMismatchError, CheckpointNotFoundError, UnsafeCheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})

logger = logging.getLogger(__name__)


def is_pickle_name(name: str) -> bool:
    """True for names that pickled weights go by."""
    return Path(name).suffix.lower() in PICKLE_SUFFIXES


def is_hub_name(name: str) -> bool:
    """Whether a Hub repository could have this name; a path such as ./mine, /mine or a/b/c could be none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def resolve_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the folder given, or the Hub repository's files, fetched if not cached.

    Raises CheckpointNotFoundError or UnsafeCheckpointError.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(str(source), revision)
    elif revision is not None:
        raise CheckpointNotFoundError(f"{source} is a local folder, which has no revision {revision!r}: leave it out")
    pickles = sorted(entry.name for entry in folder.iterdir() if is_pickle_name(entry.name))
    if pickles:
        raise UnsafeCheckpointError(
            f"{source}: {', '.join(pickles)} is a pickle, which can run code when opened; it was not opened. "
            f"Convert it to {WEIGHTS_FILE} and remove it from the folder."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointNotFoundError(f"{source}: the folder holds no {name}")
    return folder


def _fetch(repo: str, revision: str | None) -> Path:
    """Downloads the two files of a Hub repository (or finds them in the local cache) and returns their folder."""
    at = f"{repo}" + (f" at revision {revision}" if revision else "")
    path = ""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            path = hf_hub_download(repo, name, revision=revision)
        except HFValidationError:
            raise CheckpointNotFoundError(f"{repo!r} is neither a folder nor the name of a Hub repository") from None
        except RevisionNotFoundError:
            raise CheckpointNotFoundError(f"{repo} has no revision {revision!r}") from None
        except RepositoryNotFoundError:
            raise CheckpointNotFoundError(f"there is no Hub repository {repo!r}, or it is private") from None
        except LocalEntryNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{at}: the Hub cannot be reached and {name} is not in the local cache; "
                "download it once with network, or give a local folder"
            ) from error
        except EntryNotFoundError:
            _refuse_pickled_repo(repo, revision)
            raise CheckpointNotFoundError(f"{at} holds no {name}") from None
        except (HfHubHTTPError, OSError) as error:
            raise CheckpointNotFoundError(f"{at}: {name} could not be fetched: {type(error).__name__}") from error
    return Path(path).parent


def _refuse_pickled_repo(repo: str, revision: str | None) -> None:
    """Raises UnsafeCheckpointError if the repository offers pickled weights only."""
    pickles = sorted(name for name in list_repo_files(repo, revision=revision) if is_pickle_name(name))
    if pickles:
        raise UnsafeCheckpointError(f"{repo} holds {', '.join(pickles)} but no {WEIGHTS_FILE}; pickles are not opened")


def _read_config(folder: Path, accepted: set[str]) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointMismatchError(f"{folder / CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointMismatchError(f"{folder / CONFIG_FILE} is not a JSON object")
    missing = sorted(accepted - config.keys())
    if missing:
        raise CheckpointMismatchError(f"{folder / CONFIG_FILE} lacks {', '.join(missing)}")
    unknown = sorted(config.keys() - accepted)
    if unknown:
        # Other tools add keys of their own (library versions, tags); they say nothing about the network.
        logger.warning("%s: ignored unknown keys %s", folder / CONFIG_FILE, ", ".join(unknown))
    return {name: config[name] for name in accepted}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointMismatchError(f"{folder / WEIGHTS_FILE} cannot be read as safetensors: {error}") from None
    # Copies, because load_file may map the file: weights must not change or vanish with it. fp32 is what the networks
    # compute in; lower precision is chosen at run time (model.device).
    return {
        name: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }


class _NothingDrawn(TorchFunctionMode):
    """Leaves new weights unfilled: loading replaces them, and leaves torch's global generator alone.

    Memory that nobody writes costs nothing. The device "meta" would do the same and import torch's compiler: 2 s.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.normal_:
            return args[0]
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


class PretrainedMixin:
    """from_pretrained and save_pretrained for a network whose config is its constructor's keyword arguments."""

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        construct = cls.__init__
        signature = inspect.signature(construct)

        def remember_config(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            construct(self, *args, **kwargs)
            self.config = {name: value for name, value in bound.arguments.items() if name != "self"}

        remember_config.__wrapped__ = construct  # type: ignore[attr-defined]
        cls.__init__ = remember_config  # type: ignore[method-assign]

    @classmethod
    def config_keys(cls) -> set[str]:
        """Names of the constructor's arguments."""
        return set(inspect.signature(cls.__init__).parameters) - {"self"}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Loads config.json and model.safetensors of a local folder or Hub repository, in evaluation mode, on the CPU.

        revision: a commit, tag or branch; Hub repositories only.
        Raises CheckpointNotFoundError, UnsafeCheckpointError or CheckpointMismatchError.
        """
        folder = resolve_folder(source, revision)
        config = _read_config(folder, cls.config_keys())
        weights = _read_weights(folder)
        try:
            with _NothingDrawn():
                network = cls(**config)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointMismatchError(
                f"{folder / CONFIG_FILE} does not describe a {cls.__name__}: {error}"
            ) from None
        module = cast(nn.Module, network)
        _check_names_and_shapes(module, weights, folder / WEIGHTS_FILE)
        module.load_state_dict(weights, assign=True)
        module.eval()
        return network

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors into folder, each whole or not at all."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = cast(nn.Module, self).state_dict()
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
        partial = target / f".{WEIGHTS_FILE}.{os.getpid()}"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, target / WEIGHTS_FILE)
        partial = target / f".{CONFIG_FILE}.{os.getpid()}"
        partial.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, target / CONFIG_FILE)


def _check_names_and_shapes(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is not part of the network" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, not {shape}"
        for name, shape in sorted(expected.items())
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointMismatchError(f"{path}: {shown}")


def parameter_count(network: nn.Module) -> int:
    """Number of weights, buffers not counted."""
    return sum(parameter.numel() for parameter in network.parameters())


__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "PretrainedMixin",
    "is_hub_name",
    "is_pickle_name",
    "parameter_count",
    "resolve_folder",
]
