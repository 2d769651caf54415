"""Shares of a study, drawn by hosts that do not know of each other, are put together as one store.

A share's rounds become rounds of the whole, its files keep their contents: nothing is drawn or
averaged anew. The whole goes on like any store when points or networks are added to the study.
"""

from collections.abc import Sequence
from pathlib import Path

from gradflow.errors import InputError
from gradflow.studies import description, plan, results
from gradflow.studies.store import Store

__all__ = ["merge"]


def merge(folders: Sequence[Path], out: Path) -> Path:
    """Put all the shares of a study together in a new folder, and return its results' file.

    Parameters
    ----------
    folders
        The stores of the shares, each finished, in any order.
    out
        Where the whole goes: a folder that is not there yet, or is empty.

    Raises
    ------
    InputError
        If a folder holds no share, they are not of one study, one is missing, there twice or not
        finished, or ``out`` holds something or cannot be written to.
    """
    stores = [Store.of(folder) for folder in folders]
    _check(stores)
    stores.sort(key=lambda store: store.share)
    study = stores[0].study
    found = plan.groups(study)
    for store in stores:
        _check_finished(store, found)
    with Store.put_together(out, stores) as whole:
        results.write(study, found, whole)
    return out / results.FILE


def _check(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores:
        if store.share.parts == 1:
            raise InputError(
                f"folder {str(store.folder)!r} holds a whole study and no share of one; it takes "
                "the --out of `gradflow study FILE --share 1/2` and the like"
            )
        changed = description.differences(
            {**first.study.asked(), "shares": first.share.parts},
            {**store.study.asked(), "shares": store.share.parts},
        )
        if changed:
            raise InputError(
                f"folder {str(store.folder)!r} holds a share of another study than "
                f"{str(first.folder)!r}: {'; '.join(changed)}"
            )
    there: dict[plan.Share, Path] = {}
    for store in stores:
        if store.share in there:
            raise InputError(
                f"folders {str(there[store.share])!r} and {str(store.folder)!r} both hold share "
                f"{store.share}; each goes in once"
            )
        there[store.share] = store.folder
    count = first.share.parts
    missing = [n + 1 for n in range(count) if plan.Share(n, count) not in there]
    if missing:
        raise InputError(
            f"of {count} shares {', '.join(map(str, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing; give the folders of all"
        )


def _check_finished(store: Store, found: Sequence[plan.Group]) -> None:
    done, share = store.networks(), store.share
    shall = sum(share.of(count) for group in found for count in group.networks.tolist())
    if sum(done.values()) < shall:
        raise InputError(
            f"folder {str(store.folder)!r} is not finished: it holds {sum(done.values())} of "
            f"{shall} networks; `gradflow study {store.folder / 'study.toml'} --out {store.folder} "
            f"--share {share}` goes on"
        )
