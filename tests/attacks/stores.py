"""Ways to damage a store: each file of it in each of them, or a number of them by a seed.

    for attack in stores.attacks(folder): …            all
    for attack in stores.sample(folder, 40, seed=0): …  some, each kind of damage among them

An attack is put to a copy of a store, with another store at hand.
"""

import dataclasses
import os
import random
import re
import shutil
from pathlib import Path

# What damages there are, by name: functions of the file and of its like in another store.
DAMAGES = {}


def damage(function):
    DAMAGES[function.__name__] = function
    return function


@damage
def missing(path, _):
    path.unlink()


@damage
def empty(path, _):
    path.write_bytes(b"")


@damage
def cut(path, _):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@damage
def longer(path, _):
    path.write_bytes(path.read_bytes() + b"\n")


@damage
def garbage(path, _):
    path.write_bytes(random.Random(path.name).randbytes(500))


@damage
def a_folder(path, _):
    path.unlink()
    path.mkdir()


@damage
def a_dangling_link(path, _):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


@damage
def a_link_elsewhere(path, other):
    path.unlink()
    path.symlink_to(other)


@damage
def a_pipe(path, _):
    path.unlink()
    os.mkfifo(path)


@damage
def first_bit(path, _):
    _flip(path, 0.0)


@damage
def some_bit(path, _):
    _flip(path, 0.4)


@damage
def last_bit(path, _):
    _flip(path, 1.0)


@damage
def another_stores(path, other):
    shutil.copyfile(other, path)


@damage
def a_neighbours(path, _):
    """The content of the next file of the same folder and kind."""
    alike = sorted(p for p in path.parent.glob(f"*{path.suffix}") if p.is_file())
    path.write_bytes(alike[(alike.index(path) + 1) % len(alike)].read_bytes())


def _flip(path, where):
    content = bytearray(path.read_bytes())
    place = min(int(where * len(content)), len(content) - 1)
    content[place] ^= 1 << (len(content) % 8)
    path.write_bytes(bytes(content))


@dataclasses.dataclass(frozen=True)
class Attack:
    """A damage to a file, which is given from the store's folder down."""

    file: str
    damage: str

    def __str__(self):
        return f"{self.file} {self.damage}"

    def put_to(self, folder, other):
        """Damage a store, with files of another one; return whether anything is changed."""
        path = folder / self.file
        before = path.read_bytes()
        theirs = other / self.file
        if not theirs.exists():
            theirs = next(p for p in sorted((other / self.file).parent.iterdir()) if p.is_file())
        DAMAGES[self.damage](path, theirs)
        return path.is_symlink() or not path.is_file() or path.read_bytes() != before


def files(folder):
    """Return all files of a store, from its folder down, but the lock, which is empty."""
    found = (str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in found if name != "lock"]


def attacks(folder):
    """Return every damage to every file."""
    return [Attack(file, name) for file in files(folder) for name in DAMAGES]


def sample(folder, count, seed=0):
    """Return some of them: every kind of file and every damage among them."""
    draw = random.Random(seed)
    every = attacks(folder)
    draw.shuffle(every)
    chosen, kinds = [], set()
    for attack in every:
        kind = re.sub(r"\d+", "#", attack.file)
        if {kind, attack.damage} - kinds:
            kinds |= {kind, attack.damage}
            chosen.append(attack)
    rest = [attack for attack in every if attack not in chosen]
    return chosen + rest[: max(0, count - len(chosen))]


def strays(folder):
    """Put files into a store's folders that nobody wrote there; return their paths."""
    some = sorted((folder / "chunks").iterdir())[0]
    first = some.name.split("-")
    names = [
        "chunks/" + "-".join([*first[:2], "0000000000", "0000009999.npz"]),
        "chunks/0009-00000-0000000000-0000000003.npz",
        "chunks/notes.npz",
        "chunks/0000-00000.npz",
        "theory/0007-00000-000000.npz",
        "theory/x.npz",
        "rounds/0007.npz",
        "rounds/old.npz",
    ]
    for name in names:
        shutil.copyfile(some, folder / name)
    return [Path(folder / name) for name in names]
