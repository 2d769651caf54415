"""The README's Python runs, and its names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    # What a comment beside a print shows, up to each '…', is what is printed.
    shown = re.findall(r"^\s*print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert shown
    for part in "…".join(shown).split("…"):
        assert part.strip() in printed


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_commands_are_those_of_the_command_line():
    from gradflow import cli

    known = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    assert set(re.findall(r"^    gradflow (\w+)", README, re.MULTILINE)) <= known
