"""Shapeset-3×2 is what its description says, and a pure function of a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from matplotlib.path import Path as Outline

from gradflow import _shapeset
from gradflow.errors import InputError

# Every statistical test here: what it supposes to be true is rejected with this probability if it
# is true, for all of a test's hypotheses together (Bonferroni), at fixed keys.
FALSE_ALARM_RATE = 1e-3
IMAGES = 10_000
KEY = 1
ROUNDING = 1e-3  # pixels; of float32, in sums of a few numbers up to 32
SIDES = np.array([3, 4, 20])
FREQUENCIES = np.repeat([1 / 6, 1 / 9, 1 / 18], 3)


def all_of(key):
    drawn = _shapeset.scene(key)
    return drawn, drawn.label, drawn.corners, _shapeset.render(drawn)


def keys(count):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(KEY), i))(jnp.arange(count))


@pytest.fixture(scope="module")
def drawn():
    """Scenes, labels, corners, images, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(all_of))(keys(IMAGES)))


def scenes_only(monkeypatch, name, value):
    """Scenes, labels and corners of the same keys, had a constant another value."""
    monkeypatch.setattr(_shapeset, name, value)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda k: all_of(k)[:3]))(keys(IMAGES)))


def uniform_p_values(low, high, *samples):
    return [scipy.stats.kstest((x - low) / (high - low), "uniform").pvalue for x in samples]


def none_is_rejected(p_values):
    return min(p_values) * len(p_values) > FALSE_ALARM_RATE


def test_classes_are_as_frequent_as_they_should_be(drawn):
    # Objects that are left out move two in a million pairs to other classes: measured, 10^6 pairs.
    counts = np.bincount(drawn[1], minlength=9)
    assert none_is_rejected([scipy.stats.chisquare(counts, IMAGES * FREQUENCIES).pvalue])
    assert scipy.stats.chisquare(counts).pvalue < 1e-6  # nine equal classes would be found out


def test_second_objects_that_hide_too_much_are_drawn_anew_or_left_out(drawn, monkeypatch):
    scenes, labels, *_ = drawn
    first, all_labels, corners = scenes_only(monkeypatch, "_MOST_OVERLAP", np.inf)
    monkeypatch.undo()
    once, once_labels, _ = scenes_only(monkeypatch, "_REJECTIONS", 1)
    too_much = first.both & (hidden(first, corners) > 0.5)
    assert 0.3 < too_much.sum() / first.both.sum() < 0.5
    np.testing.assert_array_equal(once.both, first.both & ~too_much)
    np.testing.assert_array_equal(once_labels, np.where(too_much, once.kinds[:, 0], all_labels))
    # With 50 rejections none of these is left out, and what was good the first time has stayed.
    np.testing.assert_array_equal(scenes.both, first.both)
    np.testing.assert_array_equal(labels, all_labels)
    np.testing.assert_array_equal(scenes.kinds, first.kinds)
    np.testing.assert_allclose(scenes.centres[~too_much], first.centres[~too_much], rtol=1e-5)
    assert (scenes.centres[too_much, 1] != first.centres[too_much, 1]).all()


def test_labels_say_what_is_there(drawn):
    scenes, labels, *_ = drawn
    names = np.array(["triangle", "parallelogram", "ellipse"])
    for kinds, both, label in zip(scenes.kinds[:500], scenes.both, labels, strict=False):
        words = _shapeset.CLASSES[label].removeprefix("two ").split(" and ")
        there = set(names[kinds]) if both else {names[kinds[0]]}
        assert {w.rstrip("s") for w in words} == there
        assert _shapeset.CLASSES[label].startswith("two ") == (both and len(there) == 1)


def test_first_objects_have_the_sizes_shears_turns_and_positions_described(drawn):
    scenes, _, corners, _ = drawn
    # maps = rotation · sizes · rotation by the shear's angle: a singular value decomposition.
    _, sizes, right = np.linalg.svd(scenes.maps[:, 0].astype(float))
    larger, smaller = (sizes.T / 32 - 0.2) / 0.6
    p = uniform_p_values(0, 1, larger**2, 1 - (1 - smaller) ** 2)  # of two uniform numbers
    shear = np.arctan(-right[:, 0, 1] / right[:, 0, 0]) * SIDES[scenes.kinds[:, 0]]
    p += uniform_p_values(-np.pi, np.pi, *(shear[scenes.kinds[:, 0] == k] for k in range(3)))
    # The last corner and the first, in this order, bound the base, which is first horizontal.
    sides = SIDES[scenes.kinds[:, 0]]
    first, last = (corners[np.arange(IMAGES), 0, :, i] for i in (0, sides - 1))
    p += uniform_p_values(-np.pi, np.pi, np.arctan2(*(first - last).T[::-1]))
    low, high = corners[:, 0].min(axis=2), corners[:, 0].max(axis=2)
    p += uniform_p_values(0, 1, *((low - 1) / (30 - (high - low))).T)
    assert none_is_rejected(p)


def test_objects_stay_one_pixel_inside_and_their_border_is_background(drawn):
    scenes, _, corners, images = drawn
    assert corners.min() > 1 - ROUNDING
    assert corners.max() < 31 + ROUNDING
    edge = np.ones((32, 32), bool)
    edge[1:-1, 1:-1] = False
    assert (images[:, edge] == scenes.background[:, None]).all()


def test_objects_hide_half_at_most_by_the_rule(drawn):
    scenes, _, corners, _ = drawn
    share = hidden(scenes, corners)[scenes.both]
    assert share.max() < 0.5 + ROUNDING
    assert (share > 0.45).mean() > 0.01  # up to the limit


def hidden(scenes, corners):
    """How much of the first object the second one hides, written again in float64."""
    centres, line = scenes.centres.astype(float), np.diff(scenes.centres.astype(float), axis=1)
    distance = np.linalg.norm(line, axis=2)
    along = ((corners - centres[..., None]) * line[..., None]).sum(axis=2) / distance[..., None]
    reach = along[:, 0].max(axis=1) - along[:, 1].min(axis=1)
    distance = distance[:, 0]
    overlap = np.where(reach > distance, 1 - 2 ** (-(reach - distance) / distance), 0)
    return (
        overlap
        * areas(corners[:, 1], scenes.kinds[:, 1])
        / areas(corners[:, 0], scenes.kinds[:, 0])
    )


def areas(corners, kinds):
    """Of polygons, (objects, 2, 20), by the shoelace formula."""
    found = np.empty(len(kinds))
    for kind, sides in enumerate(SIDES):
        x, y = corners[kinds == kind, :, :sides].astype(float).swapaxes(0, 1)
        found[kinds == kind] = abs((x * np.roll(y, 1, 1) - y * np.roll(x, 1, 1)).sum(axis=1)) / 2
    return found


def test_pixels_have_mean_0_and_the_greys_mean_square(drawn):
    *_, images = drawn
    # By symmetry, and because each pixel's grey has one law up to its sign, wherever objects are.
    for power, mean in [(1, 0), (2, (1 - 0.1**3) / (3 * 0.9))]:  # the second is 0.37
        of_images = (images.astype(float) ** power).mean(axis=(1, 2))
        z = (of_images.mean() - mean) / (of_images.std(ddof=1) / np.sqrt(IMAGES))
        assert none_is_rejected([scipy.stats.norm.sf(abs(z)) * 2] * 2)


def test_greys_are_of_two_ranges_and_the_backgrounds_is_a_coin_flip(drawn):
    scenes, _, _, images = drawn
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    light = scenes.background > 0
    greys = np.concatenate([scenes.background[:, None], -scenes.greys], axis=1)
    greys = greys * np.where(light, 1, -1)[:, None]  # all are then light
    p = uniform_p_values(0.1, 1, *greys.T)
    p.append(scipy.stats.binomtest(int(light.sum()), IMAGES).pvalue)
    assert none_is_rejected(p)
    sign = np.where(light, 1, -1)[:, None, None]
    there = images != scenes.background[:, None, None]
    assert (images * sign)[there].max() < -0.1 + 1e-6
    assert there.any(axis=(1, 2)).all()


def test_pixels_are_painted_whose_centres_are_inside(drawn):
    scenes, _, corners, images = drawn
    centres = np.stack(np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5), axis=-1)
    wrong = 0
    for i in range(100):
        expected = np.full(32 * 32, scenes.background[i])
        for j in range(1 + scenes.both[i]):
            polygon = corners[i, j, :, : SIDES[scenes.kinds[i, j]]].T
            inside = Outline(polygon).contains_points(centres.reshape(-1, 2))
            expected[inside] = scenes.greys[i, j]
        wrong += (images[i].ravel() != expected).sum()
    assert wrong <= 1  # of 102 400: one whose centre is on a side, but for rounding


def test_a_key_has_one_series_however_it_is_drawn(drawn):
    _, labels, _, images = drawn
    key = jax.random.key(KEY)
    found, classes = _shapeset.draw(key, 6)
    assert (found.dtype, classes.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_allclose(found, images[:6], rtol=1e-6)
    np.testing.assert_array_equal(classes, labels[:6])
    np.testing.assert_array_equal(_shapeset.draw(key, 6)[0], found)
    later, _ = _shapeset.draw(key, 6, 4)
    np.testing.assert_array_equal(later[:2], found[4:])
    image, label = jax.jit(_shapeset.example)(jax.random.fold_in(key, 3))
    np.testing.assert_allclose(image, found[3], rtol=1e-6)
    assert label == classes[3]
    other, _ = _shapeset.draw(jax.random.key(KEY + 1), 6)
    assert (other != found).any(axis=(1, 2)).all()


def test_the_number_of_the_first_image_may_be_traced():
    later, _ = jax.eval_shape(lambda start: _shapeset.draw(jax.random.key(KEY), 6, start), 4)
    assert later.shape == (6, 32, 32)


def test_images_do_not_depend_on_the_precision_of_jax():
    key = jax.random.key(KEY)
    with jax.enable_x64(True):
        double = _shapeset.draw(key, 6)
    with jax.enable_x64(False):
        single = _shapeset.draw(key, 6)
    for a, b in zip(double, single, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "count is 0; it is a whole number of at least 1"),
        ((2.5,), "count is 2.5; it is a whole number"),
        ((3, -1), r"start is -1; a key has 2\^32 images"),
        ((3, 2**32 - 2), "start is 4294967294; a key has"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        _shapeset.draw(jax.random.key(0), *arguments)
