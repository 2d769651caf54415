"""Where the first NaN or infinite number comes from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gradflow.inspection._scaled import Scaled
from gradflow.inspection._walking import Up, Walk

__all__ = ["Born", "born_above", "born_below"]


@dataclasses.dataclass(frozen=True)
class Born:
    """The equation that made the first NaN or infinite number, going up or coming down."""

    path: str
    primitive: str
    layer: str
    direction: str
    networks: int


def born_above(walk: Walk, arguments: Mapping[int, Any], up: Up) -> Born | None:
    del walk, arguments
    return None


def born_below(
    walk: Walk,
    arguments: Mapping[int, Any],
    top: Callable[[], dict[int, Scaled]],
    finite: dict[int, Any],
) -> Born | None:
    del walk, arguments
    return None
