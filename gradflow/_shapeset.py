"""Shapeset-3×2: images of one or two shapes, endless and drawn by key, as the 2010 paper trains on.

An image has 32×32 pixels and shows one or two objects, each a triangle, a parallelogram or an
ellipse, with any stretch, shear, rotation, position and grey; its class is which they are. All of
it is a pure JAX function of a key: `jit` it, `vmap` it, draw each training step's batch anew; two
CPU cores draw some 60 000 images a second.

The objects of an image (`Scene`) are drawn at random; `render` makes its pixels of them.

References: Glorot & Bengio 2010, section 2.1; the ranges, the order of the classes and the rule
about overlap are those of its authors' generator, github.com/glorotxa/Shapeset. Here angles and
greys are continuous, and a pixel is painted if its centre is inside.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, ScalarLike

from gradflow._arguments import as_key
from gradflow._checks import check_count
from gradflow.errors import InputError

__all__ = ["CLASSES", "SIZE", "Scene", "draw", "example", "render", "scene"]

SIZE = 32  # pixels, along each side of an image
CLASSES = (
    "triangle",
    "parallelogram",
    "ellipse",
    "triangle and parallelogram",
    "parallelogram and ellipse",
    "triangle and ellipse",
    "two triangles",
    "two parallelograms",
    "two ellipses",
)
_PAIRS = np.array([[6, 3, 5], [3, 7, 4], [5, 4, 8]], np.int32)  # the class of two objects' kinds

_REJECTIONS = 50  # of the second object, before it is left out
_MOST_OVERLAP = 0.5
_SMALLEST, _LARGEST = 0.2 * SIZE, 0.8 * SIZE  # an object's size along each axis
_MARGIN = 1.0  # pixels between an object and the border
_GREYS = 0.45  # greys are 0 to 0.45 or 0.55 to 1, before they are scaled to [-1, 1]

# The three kinds as regular polygons around 0: an ellipse has 20 corners, and the others repeat
# theirs so that all arrays have one shape.
_SIDES = np.array([3, 4, 20])
_TURN = 2 * np.pi * (np.arange(20) % _SIDES[:, None]) / _SIDES[:, None] - np.pi / 2


def _unit(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Of radius ½; the first side is the horizontal base, and all are this far from the centre:
_NORMALS = _unit(_TURN).astype(np.float32)  # (kinds, 2, sides), outward
_CORNERS = (_unit(_TURN + np.pi / _SIDES[:, None]) / 2).astype(np.float32)
_REACH = (np.cos(np.pi / _SIDES) / 2).astype(np.float32)
_AREAS = (_SIDES * np.sin(2 * np.pi / _SIDES) / 8).astype(np.float32)


class Scene(NamedTuple):
    """The objects of an image. The second object, if there is one, is painted over the first.

    Attributes
    ----------
    background, greys
        Shapes () and (2,), in [-1, 1].
    kinds
        Shape (2,): 0 triangle, 1 parallelogram, 2 ellipse.
    maps, centres
        Shapes (2, 2, 2) and (2, 2): object i is the regular polygon of its kind, of radius ½,
        under p ↦ maps[i] p + centres[i]. In pixels; (x, y) is 0 at a corner of the image.
    both
        Whether there is a second object.
    """

    background: Float32[Array, ""]
    greys: Float32[Array, "2"]
    kinds: Int32[Array, "2"]
    maps: Float32[Array, "2 2 2"]
    centres: Float32[Array, "2 2"]
    both: Bool[Array, ""]

    @property
    def label(self) -> Int32[Array, ""]:
        """The class: which of `CLASSES`."""
        return jnp.where(self.both, jnp.asarray(_PAIRS)[tuple(self.kinds)], self.kinds[0])

    @property
    def corners(self) -> Float32[Array, "2 2 20"]:
        """Of both objects, x and y, in pixels; a kind with fewer has them several times."""
        mapped = jax.vmap(_times)(self.maps, jnp.asarray(_CORNERS)[self.kinds])
        return mapped + self.centres[..., None]


def scene(key: PRNGKeyArray) -> Scene:
    """Draw the objects of an image."""
    keys = jax.random.split(key, 5)
    light, two = _uniform(keys[0], 2) < 0.5
    # All objects have greys of the one range, the background of the other.
    is_light = jnp.stack([light, ~light, ~light])
    greys = 2 * (_GREYS * _uniform(keys[1], 3) + (1 - _GREYS) * is_light) - 1
    kinds = jax.random.randint(keys[2], (2,), 0, 3, jnp.int32)
    shear, turn = np.pi * (2 * _uniform(keys[3], 2, 2) - 1)
    angles = jnp.stack([shear / jnp.asarray(_SIDES, jnp.float32)[kinds], turn], axis=1)
    first, second = jax.random.split(keys[4])
    old = _placed(first, kinds[0], angles[0])

    def attempt(number: ScalarLike) -> tuple[Array, Array, Array]:
        new = _placed(jax.random.fold_in(second, number), kinds[1], angles[1])
        return *new, _overlap(kinds, old, new) <= _MOST_OVERLAP

    def more(state: tuple[Array, tuple[Array, Array, Array]]) -> Array:
        number, (_, _, accepted) = state
        return two & ~accepted & (number < _REJECTIONS)

    state = (jnp.int32(1), attempt(0))
    _, (map_, centre, accepted) = jax.lax.while_loop(
        more, lambda state: (state[0] + 1, attempt(state[0])), state
    )
    return Scene(
        background=greys[0],
        greys=greys[1:],
        kinds=kinds,
        maps=jnp.stack([old[0], map_]),
        centres=jnp.stack([old[1], centre]),
        both=two & accepted,
    )


def _placed(key: PRNGKeyArray, kind: Array, angles: Array) -> tuple[Array, Array]:
    """An object's map and centre, with random size and position."""
    size, position = _uniform(key, 2, 2)
    size = _SMALLEST + (_LARGEST - _SMALLEST) * jnp.stack([size.max(), size.min()])
    shear, turn = angles
    # Turned, stretched, and turned back until the base is horizontal: sheared. Then turned at will.
    back = -jnp.arctan(size[1] / size[0] * jnp.tan(shear))
    map_ = _times(_rotation(turn + back) * size[None], _rotation(shear))
    corners = _times(map_, jnp.asarray(_CORNERS)[kind])
    low, high = _MARGIN - corners.min(1), SIZE - _MARGIN - corners.max(1)
    return map_, low + (high - low) * position


def _overlap(kinds: Array, old: tuple[Array, Array], new: tuple[Array, Array]) -> Array:
    """Roughly the share of the old object that a new one hides; less than 0 if it hides nothing.

    d is the distance of their centres, `reach` the sum of their extents along that line. If
    reach > d they overlap by about 1 - 2^{-(reach - d)/d} of the new object, which is as much times
    the ratio of their areas of the old one.
    """
    (old_map, old_centre), (new_map, new_centre) = old, new
    line = new_centre - old_centre
    corners = jnp.asarray(_CORNERS)[kinds]
    towards_new = _times(_times(line[None], old_map), corners[0])
    towards_old = _times(_times(-line[None], new_map), corners[1])
    reach = jnp.max(towards_new) + jnp.max(towards_old)  # times d
    areas = jnp.asarray(_AREAS)[kinds] * jnp.stack([_determinant(old_map), _determinant(new_map)])
    return (1 - 2 ** (1 - reach / jnp.sum(line**2))) * areas[1] / areas[0]


def render(scene: Scene) -> Float32[Array, "32 32"]:
    """The image, [row, column], in [-1, 1]."""
    first, second = jax.vmap(_inside)(scene.kinds, scene.maps, scene.centres)
    image = jnp.where(first, scene.greys[0], scene.background)
    return jnp.where(second & scene.both, scene.greys[1], image)


def _inside(kind: Array, map_: Array, centre: Array) -> Bool[Array, "32 32"]:
    """Whether each pixel's centre is inside, on the inner side of every side's line."""
    (a, b), (c, d) = map_
    to_unit = jnp.stack([jnp.stack([d, -c]), jnp.stack([-b, a])])  # inverse, transposed, times:
    reach = _determinant(map_) * jnp.asarray(_REACH)[kind]
    x, y = _times(to_unit, jnp.asarray(_NORMALS)[kind])[..., None]
    pixels = jnp.arange(SIZE, dtype=jnp.float32)[None] + 0.5
    across = x * (pixels - centre[0]), y * (pixels - centre[1])
    return jnp.max(across[0][:, None] + across[1][:, :, None], axis=0) <= reach


def example(key: PRNGKeyArray) -> tuple[Float32[Array, "32 32"], Int32[Array, ""]]:
    """Draw an image, [row, column] in [-1, 1], and its class."""
    drawn = scene(key)
    return render(drawn), drawn.label


def draw(
    key: PRNGKeyArray, count: int, start: ScalarLike = 0
) -> tuple[Float32[Array, "{count} 32 32"], Int32[Array, " {count}"]]:
    """Draw images number ``start``, ``start`` + 1, … of the endless series that a key has.

    Image number i is that of ``example(jax.random.fold_in(key, i))``, whatever else is drawn.

    Parameters
    ----------
    key
        A JAX key.
    count
        How many images.
    start
        The first one's number; may be traced: in a training loop, the step times the batch's size.

    Returns
    -------
    images, labels
        Shapes (count, 32, 32), float32 in [-1, 1], and (count,), int32: which of `CLASSES`.

    Raises
    ------
    InputError
        If ``count`` is not at least 1, or ``start`` is out of range.
    """
    count = check_count("count", count)
    if isinstance(start, int) and not 0 <= start <= 2**32 - count:
        raise InputError(f"start is {start}; a key has 2^32 images, the first is number 0")
    numbers = jnp.asarray(start, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
    return _draw(as_key(key), numbers)


@jax.jit
def _draw(key: PRNGKeyArray, numbers: Array) -> tuple[Array, Array]:
    return jax.vmap(lambda number: example(jax.random.fold_in(key, number)))(numbers)


def _uniform(key: PRNGKeyArray, *shape: int) -> Array:
    return jax.random.uniform(key, shape, jnp.float32)  # whatever JAX's precision is


def _rotation(angle: Array) -> Array:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def _determinant(map_: Array) -> Array:
    return map_[0, 0] * map_[1, 1] - map_[0, 1] * map_[1, 0]


def _times(matrix: Array, columns: Array) -> Array:
    """The product of (n, 2) and (2, m), in float32 on any device."""
    return matrix[:, :1] * columns[:1] + matrix[:, 1:] * columns[1:]
