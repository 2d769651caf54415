"""Mutations of a study file's text, by a seed: what no user means and some files are."""

import random

_LONG = "9" * 4000
_VALUES = (
    *("0", "-1", "1e400", "nan", "inf", "-0.0", "1e-320", _LONG, f"-{_LONG}", "true", '""', "[]"),
    *("{}", '"\\u0000\\u001b[2J"', f'"{"x" * 100_000}"', "[[1]]", "{ from = 1 }", "1979-05-27"),
    *("[1, 1]", '["a", 2]', "{ from = 1, to = 2, points = 999999999999 }", "2147483648", "0x7f"),
)
_LINES = (
    "a." * 50_000 + "b = 1",
    "[" + "a." * 50_000 + "b]",
    '"\\u001b]0;x\\u0007" = 1',
    "x = " + "[" * 5000,
    "k" * 100_000 + " = 1",
    "[[axes]]",
    "[axes]",
    "networks = 99999999999999999999",
    "widths = [" + ", ".join(map(str, range(1, 3000))) + "]",
    "\ufeff\u202e",
)


def mutated(text, seed):
    """Return the text with one to three of its lines changed, moved, lost, doubled or added."""
    draw = random.Random(seed)
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(lines))
        kind = draw.choice(("value", "value", "key", "lose", "double", "move", "add", "letter"))
        key, equals, value = lines[place].partition("=")
        if kind == "value" and equals:
            lines[place] = f"{key}= {draw.choice(_VALUES)}"
        elif kind == "key" and equals:
            others = [line.partition("=")[0] for line in lines if "=" in line]
            lines[place] = f"{draw.choice(others)}={value}"
        elif kind == "lose" and len(lines) > 1:
            del lines[place]
        elif kind == "double":
            lines.insert(place, lines[place])
        elif kind == "move":
            lines.insert(draw.randrange(len(lines)), lines.pop(place))
        elif kind == "add":
            lines.insert(place, draw.choice(_LINES))
        elif lines[place]:
            at = draw.randrange(len(lines[place]))
            lines[place] = (
                lines[place][:at] + chr(draw.randrange(1, 0x300)) + lines[place][at + 1 :]
            )
    return "\n".join(lines)
