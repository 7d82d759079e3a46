"""What a command line's name of a model means."""

import pytest

from model.errors import CheckpointNotFoundError
from model.registry import (
    BUNDLED,
    BUNDLED_FOLDER,
    PUBLISHED,
    brings_tokenizer,
    load_checkpoint,
    named_source,
    network_folder,
    network_source,
)


def test_aliases_and_their_repositories_bring_their_tokenizer():
    small = PUBLISHED["kronos-small"]
    assert named_source("kronos-small") == small
    assert named_source("NeoQuasar/Kronos-small") == small
    assert named_source("bundled") == BUNDLED


def test_what_is_given_replaces_what_the_alias_says():
    other = named_source("kronos-small", tokenizer="me/tokenizer", revision="abc", max_context=256)
    assert (other.tokenizer, other.tokenizer_revision) == ("me/tokenizer", None)
    assert (other.revision, other.max_context) == ("abc", 256)


def test_a_folder_wins_over_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kronos-small").mkdir()
    found = named_source("kronos-small")
    assert (found.model, found.tokenizer, found.id) == (str(tmp_path.resolve() / "kronos-small"), None, "kronos-small")
    assert named_source("some/repo").tokenizer is None


def test_a_folder_is_found_from_another_working_directory_too(tmp_path, monkeypatch):
    """Actors have one of their own; and a folder of the name of the bundled checkpoint is still a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("bundled", "tokenizer"):
        (tmp_path / name).mkdir()
    found = named_source("bundled", tokenizer="tokenizer")
    assert (found.model, found.tokenizer) == tuple(str(tmp_path.resolve() / name) for name in ("bundled", "tokenizer"))
    assert (found.id, named_source(".").id) == ("bundled", tmp_path.resolve().name)


@pytest.mark.parametrize("alias", PUBLISHED)
def test_each_network_of_an_alias_has_its_own_repository_and_revision(alias):
    source = PUBLISHED[alias]
    for name in (alias, source.model):
        assert network_source(name, "model") == (source.model, source.revision)
        assert network_source(name, "tokenizer") == (source.tokenizer, source.tokenizer_revision)
        assert brings_tokenizer(name)


@pytest.mark.parametrize("alias", PUBLISHED)
def test_a_public_tokenizer_named_outright_is_pinned_as_its_alias_is(alias, tmp_path, monkeypatch):
    repository, pinned = PUBLISHED[alias].tokenizer, PUBLISHED[alias].tokenizer_revision
    assert network_source(repository, "tokenizer") == (repository, pinned), "as predictor.tokenizer names it"
    assert named_source("me/model", tokenizer=repository).tokenizer_revision == pinned
    assert named_source("kronos-small", tokenizer=repository).tokenizer_revision == pinned
    assert named_source("me/model", tokenizer=repository, tokenizer_revision="v2").tokenizer_revision == "v2"
    assert not brings_tokenizer(repository), "it is one network"
    monkeypatch.chdir(tmp_path)
    (tmp_path / repository).mkdir(parents=True)
    assert named_source("me/model", tokenizer=repository).tokenizer_revision is None, "a folder has no revision"


def test_the_tokenizer_of_the_larger_models_has_a_known_revision():
    assert len(network_source("NeoQuasar/Kronos-Tokenizer-base", "tokenizer")[1] or "") == 40


def test_a_folder_or_repository_is_a_pair_or_one_network(tmp_path):
    for part in ("model", "tokenizer"):
        assert network_folder("bundled", part) == BUNDLED_FOLDER / part
        assert network_folder(BUNDLED_FOLDER / part, part) == (BUNDLED_FOLDER / part).resolve()
        assert network_source("me/network", part) == ("me/network", None)
    assert brings_tokenizer(BUNDLED_FOLDER)
    assert not brings_tokenizer(BUNDLED_FOLDER / "model")
    assert not brings_tokenizer("me/network")
    (tmp_path / "tokenizer").mkdir()
    assert network_source(tmp_path, "tokenizer") == (str(tmp_path.resolve() / "tokenizer"), None), "of a run's output"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Repositories that the Hub was asked for, which holds none; the working directory has a folder models."""

    def download(repository, name, revision=None):
        asked.append((repository, revision))
        raise OSError("no network")

    asked = []
    monkeypatch.setattr("model.checkpoint.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    return asked


@pytest.mark.parametrize(
    "name", ["models/nosuch", "./models/nosuch", "elsewhere/nosuch", "/nowhere/x", "a/b/c", "none"]
)
def test_a_mistyped_folder_is_said_to_be_missing(asked, name):
    """Whatever else the name might be; it is not the lack of a tokenizer that is wrong with it."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_checkpoint(named_source(name))
    assert f"there is no folder {name}, and it is none of the known names (bundled, kronos-mini" in str(caught.value)
    assert "no tokenizer is named" not in str(caught.value)
    assert ("if it is a Hub repository" in str(caught.value)) == (name in ("models/nosuch", "elsewhere/nosuch"))
    assert asked == []


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("models/nosuch", False),  # the folder models is here
        ("./models/nosuch", False),
        ("a/b/c", False),
        ("nosuch", False),
        ("elsewhere/nosuch", True),
        ("NeoQuasar/Kronos-small", True),
    ],
)
def test_a_network_that_is_not_here_is_looked_up_only_where_it_could_be_no_folder(asked, tmp_path, name, repository):
    (
        tmp_path / "NeoQuasar"
    ).mkdir()  # of somebody who has downloaded another one: the published ones stay what they are
    for ask in (
        lambda: network_folder(name, "model"),
        lambda: load_checkpoint(named_source(name, tokenizer=str(BUNDLED_FOLDER / "tokenizer"))),
    ):
        asked.clear()
        with pytest.raises(CheckpointNotFoundError) as caught:
            ask()
        assert bool(asked) == repository
        assert (f"there is no folder {name}" in str(caught.value)) == (name != "NeoQuasar/Kronos-small")


def test_a_revision_makes_a_name_that_of_a_repository(asked):
    with pytest.raises(CheckpointNotFoundError, match="models/mine at revision v1"):
        load_checkpoint(named_source("models/mine", tokenizer=str(BUNDLED_FOLDER / "tokenizer"), revision="v1"))
    assert asked == [("models/mine", "v1")]
