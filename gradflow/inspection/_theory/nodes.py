"""Elementwise functions of a signal's variables as trees."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Node", "add", "constant", "multiply", "number", "of_function", "variable"]


class Node:
    """An elementwise function of variables and of numbers for each site, as a tree.

    Equal ones are one object, so that what is compiled for one layer serves all equal layers. Made
    by `variable`, `constant` and `of_function`.

    Attributes
    ----------
    kind
        ``"variable"``, ``"number"`` (for each site), ``"constant"``, or ``"function"``.
    value
        The place among variables or numbers; the constant; the function, of float64 arrays.
    children
        The arguments of a function.
    """

    def __init__(self, kind: str, value: Any, children: tuple["Node", ...]) -> None:
        self.kind, self.value, self.children = kind, value, children

    @functools.cached_property
    def places(self) -> frozenset[int]:
        """The places of the variables that it depends on."""
        if self.kind == "variable":
            return frozenset((self.value,))
        return frozenset[int]().union(*(child.places for child in self.children))

    def evaluate(self, variables: Sequence[Any], numbers: Sequence[Any] = ()) -> Any:
        """Its values in JAX, for arrays of the variables and numbers."""
        done: dict[Node, Any] = {}

        def of(node: Node) -> Any:
            if node not in done:
                if node.kind == "variable":
                    done[node] = variables[node.value]
                elif node.kind == "number":
                    done[node] = numbers[node.value]
                elif node.kind == "constant":
                    done[node] = node.value
                else:
                    done[node] = node.value(*map(of, node.children))
            return done[node]

        return of(self)

    def placed(self, variables: Sequence["Node"], numbers: int) -> "Node":
        """The same function of other nodes, its numbers behind so many others."""
        if self.kind == "variable":
            return variables[self.value]
        if self.kind == "number":
            return number(self.value + numbers)
        if self.kind == "constant":
            return self
        children = tuple(child.placed(variables, numbers) for child in self.children)
        return _node("function", self.value, children)


@functools.lru_cache(maxsize=1 << 14)
def _node(kind: str, value: Any, children: tuple[Node, ...] = ()) -> Node:
    return Node(kind, value, children)


def variable(place: int) -> Node:
    """The variable at a place."""
    return _node("variable", place)


def number(place: int) -> Node:
    """The numbers for each site at a place."""
    return _node("number", place)


def constant(value: float) -> Node:
    """A number that is written in the program."""
    return _node("constant", float(value))


def of_function(function: Callable[..., Any], *children: Node) -> Node:
    """A function of nodes; equal functions are hashed and compared as such."""
    return _node("function", function, children)


def add(a: Any, b: Any) -> Any:
    """The sum: one function for all nodes that add."""
    return a + b


def multiply(a: Any, b: Any) -> Any:
    """The product: one function for all nodes that multiply."""
    return a * b
