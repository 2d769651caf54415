"""Where files may be written, and files that come piece by piece."""

import os

import numpy as np
import pytest
import xarray

from gradflow import _files, figures
from gradflow.errors import InputError


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 6, 7), tuple(range(8))])
def test_slabs_are_one_dataset(tmp_path, cuts):
    draw = np.random.default_rng(0)
    dataset = xarray.Dataset(
        {
            "values": (("x", "y", "layer"), draw.normal(size=(7, 3, 4))),
            "counts": (("x", "y"), draw.integers(0, 9, (7, 3))),
            "depths": ("layer", np.arange(4.0)),
        },
        coords={
            "x": np.linspace(0, 1, 7),
            "seed": ("x", np.arange(7)),
            "y": ["a", "bb", "ccc"],
            "layer": np.arange(1, 5),
        },
        attrs={"title": "slabs", "study": "a = 1\n" * 100},
    )
    slabs = (dataset.isel(x=slice(*ends)) for ends in zip(cuts, cuts[1:], strict=False))
    _files.write_netcdf_slabs(slabs, "x", tmp_path / "whole.nc")
    found = xarray.load_dataset(tmp_path / "whole.nc")
    xarray.testing.assert_equal(found, dataset)
    assert found.attrs == dataset.attrs
    assert [path.name for path in tmp_path.iterdir()] == ["whole.nc"]


def write(path, text="new"):
    with _files.complete(path, "out") as beside:
        beside.write_text(text)


def make(kind, path):
    """What may be where a file is to be written."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link into nowhere":
        path.symlink_to("nowhere/page.html")


def identity(path):
    """Which file it is, of what kind and when it was last written; reading it changes nothing."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "which is a folder"),
        ("pipe", "which is no regular file"),
        ("link to a device", "which is no regular file"),
        ("link to itself", "which cannot be written"),
        ("link into nowhere", "which is in a folder that is not there"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, kind, message):
    path = tmp_path / "page.html"
    make(kind, path)
    before = identity(path)
    with pytest.raises(InputError, match=rf"^out is '.*page.html', {message}.*; it is a regular"):
        write(path)
    assert identity(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", [".", "/", "", "..", "file/x", "no/x", "x" * 300])
def test_names_that_no_file_can_have_are_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^out is '.*', which (is|cannot be written).*; it is a"):
        write(_files.Path(name))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_stream_of_the_process_is_no_file(tmp_path):
    """What /dev/stdout is a link to: a pipe, or a file that has no name any more."""
    (gone := tmp_path / "gone").touch()
    ends = [*os.pipe(), os.open(gone, os.O_RDWR)]
    gone.unlink()
    for end in ends:
        with pytest.raises(InputError, match=f"^out is '/dev/fd/{end}', which is no regular file"):
            write(_files.Path(f"/dev/fd/{end}"))
        os.close(end)
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link.html", tmp_path / "elsewhere" / "page.html"
    link.symlink_to(target)
    for text in ("new", "newer"):  # where nothing is yet, and where something is
        write(link, text)
        assert (link.is_symlink(), target.read_text(), target.is_symlink()) == (True, text, False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["elsewhere", "link.html", "page.html"]


def test_a_name_may_be_as_long_as_the_disk_lets_it(tmp_path):
    write(tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255)).read_text() == "new"


def test_what_fails_on_the_way_is_said_once_and_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "kept"
    write(path, "old")

    def fail():
        with _files.complete(path) as beside:
            beside.mkdir()  # so that it cannot be taken away as a file
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cannot write .*kept': no space left"):
        fail()
    assert path.read_text() == "old"


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    figure = figures.Figure()
    with pytest.raises(InputError, match="which is no regular file"):
        figures.save(figure, _files.Path("/dev/null"))
    assert figures.save(figure, tmp_path / "a.svg").read_text().startswith("<?xml")
    assert figures.save(figure, tmp_path / "b").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="c.bmpp'; its ending is one of .*png"):
        figures.save(figure, tmp_path / "c.bmpp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b"]
