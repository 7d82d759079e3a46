"""From a name to a verified checkpoint: the bundled one, a local folder, or Hub repositories pinned by revision."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from model.checkpoint import WEIGHTS_FILE, is_hub_name, parameter_count, resolve_folder
from model.errors import CheckpointMismatchError, CheckpointNotFoundError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

MANIFEST_FILE = "SHA256SUMS"
"""As `sha256sum model/* tokenizer/* > SHA256SUMS` writes it, in the folder that holds model/ and tokenizer/."""

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

Part = Literal["model", "tokenizer"]
"""The two networks of a checkpoint, called as their folders are where one folder holds both."""


@dataclass(frozen=True)
class CheckpointSource:
    """Where a model and its tokenizer come from.

    id: the name that it is served under.
    model: "bundled"; a local folder, which holds the folders model/ and tokenizer/ or a model alone; or org/repo.
    tokenizer: a local folder or org/repo; None only where model holds both.
    revision, tokenizer_revision: commit, tag or branch of Hub repositories.
    max_context: bars that the model sees at once.
    """

    id: str
    model: str
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    max_context: int = 512


BUNDLED = CheckpointSource(id="kronos-bundled", model="bundled")

_TOKENIZER_BASE = "NeoQuasar/Kronos-Tokenizer-base"
_TOKENIZER_BASE_REVISION = "0e0117387f39004a9016484a186a908917e22426"

PUBLISHED = {
    "kronos-mini": CheckpointSource(
        id="kronos-mini",
        model="NeoQuasar/Kronos-mini",
        tokenizer="NeoQuasar/Kronos-Tokenizer-2k",
        max_context=2048,
    ),
    "kronos-small": CheckpointSource(
        id="kronos-small",
        model="NeoQuasar/Kronos-small",
        tokenizer=_TOKENIZER_BASE,
        revision="901c26c1332695a2a8f243eb2f37243a37bea320",
        tokenizer_revision=_TOKENIZER_BASE_REVISION,
    ),
    "kronos-base": CheckpointSource(
        id="kronos-base",
        model="NeoQuasar/Kronos-base",
        tokenizer=_TOKENIZER_BASE,
        tokenizer_revision=_TOKENIZER_BASE_REVISION,
    ),
}
"""The public checkpoints by alias. Those without a known good revision follow the repository's main branch."""

KNOWN_NAMES = ", ".join(["bundled", *PUBLISHED])
"""For errors."""

_REVISIONS = {
    repository: revision
    for source in PUBLISHED.values()
    for repository, revision in ((source.model, source.revision), (source.tokenizer, source.tokenizer_revision))
}
"""The public repositories, each network alone, and the revision that its alias is pinned to."""


def named_source(
    name: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    max_context: int | None = None,
) -> CheckpointSource:
    """What a command line calls a model: bundled, an alias of PUBLISHED, a local folder or a Hub repository.

    What is given beside the name replaces what the alias says. A folder wins over an alias: whoever trained one into
    ./kronos-small means it. A public repository has the revision of its alias unless one is given.
    """
    folder = Path(name)
    published = {source.model: source for source in PUBLISHED.values()}
    known = {"bundled": BUNDLED, BUNDLED.id: BUNDLED, **published, **PUBLISHED}
    if folder.is_dir():
        base = CheckpointSource(id=folder.resolve().name, model=whole_path(name))
    elif name not in known:
        base = CheckpointSource(id=name, model=name, revision=_REVISIONS.get(name))
    else:
        base = known[name]
    if tokenizer:
        # A revision says nothing about another repository.
        found = whole_path(tokenizer)
        base = replace(base, tokenizer=found, tokenizer_revision=_REVISIONS.get(found))
    return replace(
        base,
        revision=revision or base.revision,
        tokenizer_revision=tokenizer_revision or base.tokenizer_revision,
        max_context=max_context or base.max_context,
    )


def whole_path(name: str) -> str:
    """A folder by its whole path, since an actor's working directory is another one; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def network_source(name: str | os.PathLike[str], part: Part) -> tuple[str, str | None]:
    """(folder or Hub repository, the repository's revision) of one network of what named_source names.

    A folder or repository that is that network alone names it too.
    """
    source = named_source(os.fspath(name))
    if part == "model":
        return _model_of(source), source.revision
    tokenizer = _tokenizer_of(source)
    return (source.model, source.revision) if tokenizer is None else (tokenizer, source.tokenizer_revision)


def network_folder(name: str | os.PathLike[str], part: Part) -> Path:
    """The local folder of network_source, fetched if it is not there.

    Raises CheckpointNotFoundError or UnsafeCheckpointError.
    """
    return _find(*network_source(name, part))


def brings_tokenizer(name: str | os.PathLike[str]) -> bool:
    """Whether a name, as named_source takes it, stands for a model and its tokenizer."""
    return _tokenizer_of(named_source(os.fspath(name))) is not None


@dataclass(frozen=True)
class Checkpoint:
    """A model and its tokenizer, loaded on the CPU, in evaluation mode, verified.

    sha256: over the bytes of both weight files. revision: of the model's repository, if it came from the Hub.
    parameters: of the model, without its tokenizer.
    model_version, tokenizer_version: where the weights came from and which they are, short enough for every answer.
    """

    source: CheckpointSource
    model: Kronos
    tokenizer: KronosTokenizer
    sha256: str
    revision: str | None
    parameters: int
    model_version: str
    tokenizer_version: str


def load_checkpoint(source: CheckpointSource) -> Checkpoint:
    """Finds, loads and verifies a checkpoint.

    Raises CheckpointNotFoundError, UnsafeCheckpointError, or CheckpointMismatchError for weights that are not finite, a
    pair that does not belong together, or files that are not those of the folder's manifest, if it has one.
    """
    _check_manifest(BUNDLED_FOLDER if source.model == "bundled" else Path(source.model))
    model_source, tokenizer_source = _pair(source)
    model_folder = _find(model_source, source.revision)
    tokenizer_folder = _find(tokenizer_source, source.tokenizer_revision)
    model = Kronos.from_pretrained(model_folder)
    tokenizer = KronosTokenizer.from_pretrained(tokenizer_folder)
    if (model.s1_bits, model.s2_bits) != (tokenizer.s1_bits, tokenizer.s2_bits):
        raise CheckpointMismatchError(
            f"{source.id}: the model has {model.s1_bits} + {model.s2_bits} bits, the tokenizer "
            f"{tokenizer.s1_bits} + {tokenizer.s2_bits}: they do not belong together"
        )
    _require_finite(model, model_source)
    _require_finite(tokenizer, tokenizer_source)
    model_digest, tokenizer_digest = (sha256_of(folder / WEIGHTS_FILE) for folder in (model_folder, tokenizer_folder))
    return Checkpoint(
        source=source,
        model=model,
        tokenizer=tokenizer,
        sha256=hashlib.sha256(f"{model_digest}{tokenizer_digest}".encode()).hexdigest(),
        revision=_hub_revision(model_folder) or source.revision,
        parameters=parameter_count(model),
        model_version=_version(model_source, model_folder, source.revision, model_digest),
        tokenizer_version=_version(tokenizer_source, tokenizer_folder, source.tokenizer_revision, tokenizer_digest),
    )


def _pair(source: CheckpointSource) -> tuple[str, str]:
    """The model's and the tokenizer's folder or repository."""
    model, tokenizer = _model_of(source), _tokenizer_of(source)
    if tokenizer is not None:
        return model, tokenizer
    if not _is_certain(model, source.revision):
        remedy = ", or name its tokenizer too if it is a Hub repository" if is_hub_name(model) and "/" in model else ""
        raise CheckpointNotFoundError(_no_folder(model) + remedy)
    raise CheckpointNotFoundError(
        f"{source.id}: no tokenizer is named, and {source.model} holds no folders model/ and tokenizer/"
    )


def _find(name: str, revision: str | None) -> Path:
    """The local folder of one network, fetched if the name is a Hub repository's.

    A mistyped folder must not become the weights of a stranger: a bare name, and one in a folder that is here, are not
    looked up.
    Raises as model.checkpoint.resolve_folder does.
    """
    if _is_certain(name, revision):
        return resolve_folder(name, revision)
    if not is_hub_name(name):
        raise CheckpointNotFoundError(_no_folder(name))
    if "/" not in name:
        raise CheckpointNotFoundError(_no_folder(name))
    if Path(name).parent.is_dir():
        raise CheckpointNotFoundError(
            f"{_no_folder(name)}; a Hub repository of that name is looked up only with a revision, or where there is "
            f"no folder {Path(name).parent}"
        )
    try:
        return resolve_folder(name)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(f"{error}; and there is no folder {name}") from error


def _is_certain(name: str, revision: str | None) -> bool:
    """Whether a name can mean one thing only: a folder that is here, or a repository; no folder has a revision."""
    return Path(name).is_dir() or name in _REVISIONS or revision is not None


def _no_folder(name: str) -> str:
    if name in PUBLISHED:
        return f"there is no folder {name}, and here a model is named by its repository: {PUBLISHED[name].model}"
    return f"there is no folder {name}, and it is none of the known names ({KNOWN_NAMES}): correct it"


def _model_of(source: CheckpointSource) -> str:
    return _within(source, "model") or source.model


def _tokenizer_of(source: CheckpointSource) -> str | None:
    return source.tokenizer or _within(source, "tokenizer")


def _within(source: CheckpointSource, part: Part) -> str | None:
    """The network's folder in the one that holds both; None where there is no such folder."""
    folder = BUNDLED_FOLDER if source.model == "bundled" else Path(source.model)
    if (folder / part).is_dir():
        return str(folder / part)
    if source.model == "bundled":
        raise CheckpointNotFoundError("the bundled checkpoint is not part of this installation")
    return None


def _check_manifest(folder: Path) -> None:
    """Raises CheckpointMismatchError unless every file that the manifest lists is there and is what it was."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return
    for line in manifest.read_text(encoding="utf-8").splitlines():
        entry = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if entry is None:
            raise CheckpointMismatchError(f"{MANIFEST_FILE} holds a line that sha256sum does not write")
        path = folder / entry[2]
        if not path.is_file() or sha256_of(path) != entry[1]:
            raise CheckpointMismatchError(f"{entry[2]} is not the file that {MANIFEST_FILE} lists")


def _require_finite(network: nn.Module, source: str) -> None:
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointMismatchError(f"{source}: {name} holds NaN or infinite values")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_revision(folder: Path) -> str | None:
    """The commit, if the folder is a snapshot in the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _version(source: str, folder: Path, revision: str | None, digest: str) -> str:
    """repo@commit, or the folder's name, with the first digits of the weights' sha256. Never a whole path."""
    commit = _hub_revision(folder) or revision
    if commit:
        return f"{source}@{commit[:12]}+{digest[:12]}"
    local = Path(source)
    name = f"bundled-{local.name}" if local.parent == BUNDLED_FOLDER else local.name
    return f"{name}+{digest[:12]}"
