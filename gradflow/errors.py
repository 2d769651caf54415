"""The errors that bad input raises: one sentence that says what was given and what is allowed."""

__all__ = ["InputError", "NoTheory", "UnknownName", "printable"]

# Characters of a message: what was given may be a file's whole content.
_LONGEST = 1200


def printable(text: str, longest: int = _LONGEST) -> str:
    """Text as one line that is safe to print on a terminal.

    Control characters, newlines and other invisible characters are escaped, and the middle of a
    long text is left out, so that text from a file can neither drive a terminal nor pass for
    gradflow's own words.

    Parameters
    ----------
    text
        Any text.
    longest
        The number of characters above which the middle is left out.

    Returns
    -------
    str
        The text, escaped and shortened.
    """
    if len(text) > longest:
        kept = longest // 2
        left_out = f" [{len(text) - 2 * kept} characters] "
        text = f"{text[:kept]}{left_out}{text[-kept:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """Input that cannot be used.

    The message is one sentence: the input's name, its value, and the values that are allowed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NoTheory(InputError):
    """A network that can be simulated and that the theory does not know; the sentence says why."""


class UnknownName(InputError, KeyError):
    """A name that results do not hold: the ``KeyError`` of a mapping, with a sentence.

    Its message lists the names that there are.
    """

    __str__ = Exception.__str__
