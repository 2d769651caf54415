"""Weights as people write them: ``glorot*5/3``, ``normal(0.02)``, ``he:orthogonal``, read as text.

    ensemble = [number "*"] (name | function "(" number {"," number} ")" | number) {change}
    change   = "*" number | "/" number | ":" distribution
    number   = ["-"] digits | "sqrt(" number ")", and such divided or multiplied

Nothing is evaluated but these.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from gradflow._checks import unknown_name
from gradflow.errors import InputError

__all__ = ["Function", "Reader", "as_text", "split"]


# An `ensembles.Ensemble`, which is read here and imports this.
_Law = Any
# How many numbers it takes, and the ensemble that it makes of them.
Function = tuple[tuple[int, ...], Callable[..., _Law]]
_EXAMPLES = "as he, glorot*5/3, normal(0.02), uniform(-0.05,0.05), constant(0.1) or torch"
_TOKEN = re.compile(r"[a-z_][a-z_0-9]*|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|\S")


class Reader:
    """Reads an ensemble: a name, with numbers it may be, then gains and distributions."""

    def __init__(
        self, text: str, names: Mapping[str, _Law], functions: Mapping[str, Function]
    ) -> None:
        self.text, self.names, self.functions = text, names, functions
        self.tokens = _TOKEN.findall(text.lower())

    def read(self) -> _Law:
        """The ensemble.

        Raises
        ------
        InputError
            If the text is none.
        """
        if self._is_number():
            number = self._product()
            if not self.tokens:
                return self.functions["normal"][1](number)
            self._take("*")
            ensemble = self._named().with_gain(number)
        else:
            ensemble = self._named()
        while self.tokens:
            if self._next() == ":":
                self._take(":")
                ensemble = ensemble.drawn_from(self.tokens.pop(0) if self.tokens else "")
            elif self._next() == "/":
                ensemble = ensemble.with_gain(self._product(1.0))
            else:
                self._take("*")
                ensemble = ensemble.with_gain(self._product())
        return ensemble

    def _next(self) -> str:
        return self.tokens[0] if self.tokens else ""

    def _take(self, token: str) -> None:
        if self._next() != token:
            raise self._wrong()
        self.tokens.pop(0)

    def _wrong(self) -> InputError:
        return InputError(
            f"weights is {self.text!r}; it is the name of an ensemble, with numbers, gains or a "
            f"distribution, {_EXAMPLES}"
        )

    def _is_number(self) -> bool:
        first = self._next()
        return first in ("-", "sqrt") or first[:1].isdigit() or first.startswith(".")

    def _named(self) -> _Law:
        name = self.tokens.pop(0) if self.tokens else ""
        if name in self.functions and self._next() == "(":
            return self._call(name)
        known = self.names
        if name not in known:
            if not name.isidentifier():
                raise self._wrong()
            raise unknown_name("weights", self.text, (*known, *(f"{f}(…)" for f in self.functions)))
        return known[name]

    def _call(self, name: str) -> _Law:
        counts, make = self.functions[name]
        self._take("(")
        numbers = [self._product()]
        while self._next() == ",":
            self._take(",")
            numbers.append(self._product())
        self._take(")")
        if len(numbers) not in counts:
            many = " or ".join(map(str, counts))
            raise InputError(f"weights is {self.text!r}; {name} takes {many} numbers")
        return make(*numbers)

    def _product(self, value: float | None = None) -> float:
        """The next number, or one already read, with the factors and divisors after it."""
        value = self._number() if value is None else value
        while self._next() in ("*", "/") and len(self.tokens) > 1:
            by, self.tokens = self.tokens[0], self.tokens[1:]
            if not self._is_number():
                self.tokens.insert(0, by)
                break
            number = self._number()
            if by == "/" and number == 0:
                raise self._wrong()
            value = value * number if by == "*" else value / number
        return value

    def _number(self) -> float:
        token = self.tokens.pop(0) if self._is_number() else ""
        if token == "-":
            return -self._number()
        if token == "sqrt":
            self._take("(")
            square = self._product()
            self._take(")")
            if square >= 0:
                return math.sqrt(square)
        elif token:
            value = float(token)
            if math.isfinite(value):
                return value
        raise self._wrong()


def split(text: str) -> list[str]:
    """The parts between commas that are not within parentheses."""
    return re.split(r",(?![^()]*\))", text)


def as_text(value: float) -> str:
    """A number as a name has it: short, and read as the same number to the last digit."""
    value = float(value)
    short = f"{value:g}"
    if float(short) == value or not math.isfinite(value):
        return short
    for denominator in range(2, 10):
        numerator = round(value * denominator)
        if numerator / denominator == value:
            return f"{numerator}/{denominator}"
    square = f"{value * value:.12g}"
    return f"sqrt({square})" if math.sqrt(float(square)) == value else repr(value)
