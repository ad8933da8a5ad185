"""A folder appears whole or not at all."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

import fasp_graph as fg
from fasp_graph.folders import whole as module
from fasp_graph.folders.whole import whole


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def written(target, text):
    with whole(target) as draft:
        (draft / "a").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        refusal = OSError(errno.ENOSYS, "no such call")
        monkeypatch.setattr(module, "_exchange", lambda *_: (_ for _ in ()).throw(refusal))
    target = tmp_path / "deep" / "small"

    for text in ("one", "two"):
        written(target, text)

    assert (target / "a").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["small"]


def test_a_draft_is_private_and_the_folder_as_the_umask_says(tmp_path):
    with whole(tmp_path / "small") as draft:
        assert mode(draft) == 0o700 and draft.parent == tmp_path

    assert mode(tmp_path / "small") == 0o777 & ~module.umask()


def test_an_error_inside_leaves_the_old_folder(tmp_path):
    written(tmp_path / "small", "old")

    with pytest.raises(KeyError), whole(tmp_path / "small") as draft:
        (draft / "a").write_text("new")
        raise KeyError

    assert (tmp_path / "small" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_drafts_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    dead = tmp_path / f".small.{'0' * 32}"
    dead.mkdir()
    foreign = tmp_path / ".small.notes"
    foreign.mkdir()

    with whole(tmp_path / "small") as first:
        written(tmp_path / "small", "second")
        assert first.exists() and not dead.exists()

    assert foreign.exists()


def test_a_link_in_place_of_a_draft_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / f".small.{'1' * 32}").symlink_to(tmp_path / "mine")

    written(tmp_path / "small", "new")

    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.fixture
def unprivileged():
    """As root nothing is read-only: the user `nobody` tries."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_read_only_folder_is_told(unprivileged):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o500)
        try:
            with pytest.raises(fg.FaspGraphError, match="Permission denied.*may write"):
                written(Path(place) / "small", "new")
            assert not list(Path(place).iterdir())
        finally:
            os.chmod(place, 0o700)
