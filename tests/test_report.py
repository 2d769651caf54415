"""The page on a study: whole, escaped, without addresses, and readable in a real browser."""

import html.parser
import os
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import xarray
from typer.testing import CliRunner

from gradflow import cli
from gradflow.errors import InputError
from gradflow.figures import _study as figure
from gradflow.studies import _execution, _report, _results, _study_file

EVIL = '<script>alert("1")</script> & <img src=x>'
TEXT = f"""
title = '{EVIL}'
question = '{EVIL}'
[network]
activation = "tanh"
width = 10
depth = 3
[[axes]]
sigma_w2 = {{ from = 0.5, to = 2, points = 4 }}
[[axes]]
sigma_b2 = {{ from = 0.01, to = 1, points = 5, spacing = "geometric" }}
[sampling]
networks = 12 # {EVIL}
"""
BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A store that the command line has made, and what it said."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)  # typer's calls are its own
        said = invoke("study", folder / "study.toml", "--out", folder / "out")
        invoke("report", folder / "out")
    return folder / "out", said


def invoke(*arguments):
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


class Reader(html.parser.HTMLParser):
    """What tags, addresses and texts a page has."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k.endswith(("href", "src", "action"))]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.medium
def test_the_page_is_whole_and_what_is_in_a_file_is_text(study):
    page = (study[0] / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    # Within the page, or in it: images of maps.
    assert all(re.match(r"#|data:image/png", address) for address in reader.addresses)
    assert "url(http" not in page
    assert reader.tags.count("svg") == 5
    text = "".join(reader.text)
    assert text.count(EVIL) >= 4  # title twice, question, and in the file
    for word in ("Theory against measurement", "How to make it again", "standard errors", "q"):
        assert word in text
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    figures = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in page.split("<svg")[1:]]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    shared = set.union(*(a & b for n, a in enumerate(figures) for b in figures[:n]))
    assert used <= set(identifiers)
    # A letter's outline is the same in all figures.
    assert not {name for name in shared & used if not name.startswith("DejaVu")}


def test_a_study_without_a_plane_has_lines_by_layer(study):
    dataset = xarray.load_dataset(study[0] / "results.nc")
    row = dataset.isel(sigma_b2=slice(0, 1), layer=slice(0, 2))
    assert _report.page(row).count("theory as lines, measurement as points") == 4


@pytest.mark.medium
def test_a_grid_without_a_plane_has_every_point_in_a_map_and_a_table(study):
    """Four by two points: seven curves would be some of them."""
    dataset = xarray.load_dataset(study[0] / "results.nc").isel(sigma_b2=slice(0, 2))
    page = _report.page(dataset)
    assert "measurement as points" not in page
    assert page.count("at each of 8 points, a row each") == 4
    change = dataset.log_gradient_norm.isel(layer=0) - dataset.log_gradient_norm.isel(layer=-1)
    table = page.partition("What becomes of the gradient")[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 8
    for value in change.to_numpy().ravel():
        assert f"×{np.exp(value):.3g}" in table
        assert f"×{np.exp(value / 2):.4g}" in table


DEEP = """
[network]
activation = "tanh"
width = 60
depth = 9
[[axes]]
sigma_w2 = { from = 0.5, to = 2, points = 4 }
[[axes]]
sigma_b2 = [0.0, 0.1, 0.2, 0.3]
[sampling]
networks = 40
[statistics]
measure = ["q", "gradient_variance", "log_gradient_norm"]
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Results of networks that are deep enough to have depth scales."""
    folder = tmp_path_factory.mktemp("deep")
    written = _execution.run(_study_file.parse(DEEP), folder / "out").results
    return xarray.load_dataset(written)


def figures_of(page):
    """The captions of a page's figures."""
    return [html.unescape(c) for c in re.findall("<figcaption>(.*?)</figcaption>", page, re.DOTALL)]


@pytest.mark.slow
def test_depth_scales_are_maps_over_a_plane_and_a_row_of_the_table(deep):
    page = _report.page(deep)
    (caption,) = (c for c in figures_of(page) if "Depth scales" in c)
    assert "|ξ_∇| of gradients" in caption
    assert "over sigma_w2 and sigma_b2." in caption
    row = _results.agreement(deep, "rate_grad")
    assert row["values"] == 16
    assert row["within"] == 1
    assert f"<td class=text>rate_grad<td>16<td>100 %<td>100 %<td>{row['largest_z']:.4g}" in page
    assert not any("How far networks" in c for c in figures_of(page))


def test_along_one_axis_they_are_lines_and_the_spread_is_a_figure(deep):
    captions = figures_of(_report.page(deep.isel(sigma_b2=slice(0, 2))))
    assert any("Depth scales" in c and "along sigma_w2" in c for c in captions)
    (spread,) = (c for c in captions if "How far networks" in c)
    assert "left out" not in spread  # tanh networks do not die


def test_places_on_an_axis_of_several_fields_are_told_by_the_first_that_tells(deep):
    dataset = deep.rename(sigma_w2="a_b").assign_coords(
        a=("a_b", ["x", "x", "y", "y"]), b=("a_b", [1, 2, 3, 4]), a_b=np.arange(4)
    )
    assert figure.where(dataset, {"a_b": 2, "sigma_b2": 1}) == "b 3, sigma_b2 0.1"
    assert figure.where(dataset.drop_vars("b"), {"a_b": 2}) == "a_b 2"
    assert _results.agreement(dataset, "q")["where"].keys() == {"b", "sigma_b2", "layer"}


@pytest.mark.usefixtures("unchecked")
def test_show_and_export_have_what_the_results_have(study, tmp_path):
    folder, said = study
    dataset = xarray.load_dataset(folder / "results.nc")
    assert "sigma_w2 (4) × sigma_b2 (5), 3 layers; 240 networks, float32" in said
    invoke("export", folder, "--csv", tmp_path / "a.csv", "--netcdf", tmp_path / "a.nc")
    xarray.testing.assert_identical(xarray.load_dataset(tmp_path / "a.nc"), dataset)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 5 * 3
    found = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert float(found["q"]) == pytest.approx(float(dataset.q[-1, -1, -1]), rel=1e-12)
    assert float(found["sigma_b2"]) == 1
    (folder / "results.nc").rename(tmp_path / "kept")
    try:
        for command in ("show", "report"):
            done = CliRunner().invoke(cli.app, [command, str(folder)])
            assert "results.nc" in str(done.exception), done.output
    finally:
        (tmp_path / "kept").rename(folder / "results.nc")


@pytest.mark.slow
def test_shares_are_merged_on_the_command_line(study, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    file = study[0] / "study.toml"
    for share in ("1/2", "2/2"):
        said = invoke("study", file, "--share", share, "--out", tmp_path / share[0])
        assert "120 networks" in said
    said = invoke("merge", tmp_path / "2", tmp_path / "1", "--out", tmp_path / "whole")
    assert "240 networks" in said
    found, whole = (xarray.load_dataset(p / _results.FILE) for p in (tmp_path / "whole", study[0]))
    np.testing.assert_allclose(found.q, whole.q, rtol=1e-5)
    wrong = [
        (("study", file, "--share", "3/2"), "share is '3/2'; it is which part of how many"),
        (("study", "--share", "1/2"), "--share goes with a study file"),
        (("merge", tmp_path / "1", "--out", tmp_path / "o"), "of 2 shares 2 is missing"),
        (("merge", tmp_path, "--out", tmp_path / "o"), "which holds no study"),
    ]
    for arguments, message in wrong:
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_it(study, tmp_path, width):
    """Nothing beyond the window's edge: the right margin is white."""
    picture = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},3000", f"--screenshot={picture}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (study[0] / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert picture.exists(), done.stderr
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[1] == width
    assert np.all(pixels[:, -8:] == 1)
    dark = (pixels.mean(axis=2) < 0.5).mean(axis=1) > 0  # lines of pixels with something in them
    assert dark.mean() > 0.2
    colours = np.ptp(pixels, axis=2) > 0.3
    assert colours.mean() > 0.005  # the maps
