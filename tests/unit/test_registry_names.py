"""What a command line's name of a model means."""

from model.registry import BUNDLED, PUBLISHED, named_source


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
