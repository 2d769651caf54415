"""Networks in training on disk, so that a run that was interrupted can be resumed.

Each chunk of networks has a file of its own, with its state and records. Files are replaced whole,
so that a process may be killed at any time.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradflow._files import complete, writable_folder
from gradflow.errors import InputError

__all__ = ["Saved", "identity"]


def identity(programs: Sequence[str], values: Any) -> str:
    """A name for the results of these programs, by their texts, on these arrays."""
    digest = hashlib.sha256()
    for text in programs:
        digest.update(text.encode())
    for leaf in jax.tree.leaves(values):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class Saved:
    """The folder of one run, named by its `identity`, in the folder that the caller names."""

    def __init__(self, folder: str | Path, name: str) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise InputError(f"save is {folder!r}; it is a folder's path")
        self.folder = writable_folder(Path(folder) / name, "save")

    def plan(self, plan: Sequence[int]) -> list[int]:
        """The grouping of networks that the run began with, and keeps: at first ``plan``."""
        path = self.folder / "plan.json"
        if not os.path.lexists(path):
            with complete(path) as beside:
                beside.write_text(json.dumps(list(plan)), encoding="utf-8")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(path) from error
        whole = isinstance(saved, list) and len(saved) == len(plan)
        if not whole or not all(type(n) is int and n > 0 for n in saved):
            raise self._damaged(path)
        return saved

    def _damaged(self, path: Path) -> InputError:
        return InputError(
            f"cannot read {str(path)!r}, where a run was saved; remove {str(self.folder)!r} to "
            "begin anew"
        )

    def write(self, first: int, state: Sequence[np.ndarray], records: dict[str, Any]) -> None:
        """Save the leaves of a chunk's state, and its records."""
        named: dict[str, Any] = {f"state/{number}": leaf for number, leaf in enumerate(state)}
        named |= {f"records/{name}": value for name, value in records.items()}
        with complete(self._path(first)) as beside, beside.open("wb") as file:
            np.savez(file, **named)

    def read(self, first: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]] | None:
        """The state and records that were written last; None if there are none."""
        path = self._path(first)
        if not os.path.lexists(path):
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            count = sum(key.startswith("state/") for key in arrays)
            leaves = [arrays[f"state/{n}"] for n in range(count)]
        except Exception as error:  # there is hardly one that a damaged file cannot cause
            raise self._damaged(path) from error
        names = (key.partition("/") for key in arrays)
        return leaves, {n: arrays[f"records/{n}"] for kind, _, n in names if kind == "records"}

    def _path(self, first: int) -> Path:
        return self.folder / f"networks-{first}.npz"
