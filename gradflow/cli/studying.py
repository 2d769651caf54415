"""Commands on study files and their stores: plan, show, export, and how `study` runs one."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import xarray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gradflow._files import complete
from gradflow.cli._process import GRACE, say
from gradflow.cli._shared import (
    Json,
    app,
    make_console,
    print_json,
    writable_file,
    write_netcdf,
    write_text,
)
from gradflow.errors import InputError

File = Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="The --out of a `gradflow study FILE`.", show_default=False)
]

# Seconds between two lines of progress, where there is no terminal.
_LINE_EVERY = 10.0


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow plan scripts/phase-diagram.toml`\n"
    "- `gradflow plan study.toml --json`"
)
def plan(file: File, as_json: Json = False) -> None:
    """Say what a study file would take: programs, networks, memory and time; nothing is run."""
    from gradflow.studies import _plan as plans  # noqa: PLC0415  (JAX is slow to import)
    from gradflow.studies import results, study_file  # noqa: PLC0415

    study = study_file.load(file)
    made = plans.make(study, plans.programs(study))
    plans.check_memory(study, made)
    results.check(study)
    rows = [
        {
            "activation": program.network.activation.name,
            "layers": program.network.depth,
            "widest": max(program.network.widths),
            "points": len(program.names),
            "networks": task.networks,
            "chunks": task.chunks,
            "sampler": program.sampler,
            "why": program.reason,
        }
        for program, task in zip(made.programs, made.tasks, strict=True)
    ]
    found = {
        "title": study.title,
        "points": len(study),
        "axes": {axis.name: len(axis) for axis in study.axes},
        "programs": len(rows),
        "networks": made.networks,
        "most_networks": len(study) * study.sampling.most
        if study.sampling.target
        else made.networks,
        "chunk_bytes": made.chunk_bytes,
        "output_bytes": made.output_bytes,
        "seconds": round(made.seconds, 1),
        "groups": rows,
    }
    if as_json:
        print_json(found)
        return
    console = make_console()
    console.print(f"study     {_one_line(study.title or file.name)}")
    shape = " × ".join(f"{axis.name} ({len(axis)})" for axis in study.axes) or "one point"
    console.print(f"grid      {_one_line(shape)}: {len(study)} points")
    table = Table(box=box.SIMPLE)
    for name in ("activation", "layers", "widest", "points", "networks", "chunks", "sampler"):
        text = name in ("activation", "sampler")
        table.add_column(name, justify="left" if text else "right")
    for row in rows[:20]:
        table.add_row(*(str(row[str(column.header)]) for column in table.columns))
    console.print(table)
    if len(rows) > 20:
        console.print(f"          … and {len(rows) - 20} more programs")
    first = " in the first round" if study.sampling.target else ""
    console.print(f"compiles  {len(rows)} programs, and those of the theory")
    console.print(f"networks  {made.networks}{first}")
    if study.sampling.target:
        console.print(f"at most   {found['most_networks']}, until every target is met")
    console.print(f"memory    {_size(made.chunk_bytes)} a chunk, {_size(made.available)} free")
    console.print(f"results   {_size(made.output_bytes)}")
    console.print(f"time      about {_duration(made.seconds)}{first}, on this machine")


def run(study: Any, folder: Path, part: Any = None) -> int:
    """Run a study into a folder, with progress, until it is finished; exit if it is interrupted.

    Of a study that is shared, its part. Return how many networks the folder has in all.
    """
    import jax  # noqa: PLC0415

    from gradflow.studies import execution  # noqa: PLC0415
    from gradflow.studies._plan import WHOLE  # noqa: PLC0415

    with _interruptible() as stop, _progress() as report:
        outcome = execution.run(study, folder, share=part or WHOLE, progress=report, stop=stop)
    if jax.process_index() == 0 and not outcome.finished:
        say(f"gradflow: {str(folder)!r} holds {outcome.networks} networks")
        raise typer.Exit(130)
    return outcome.networks


def run_file(file: Path, folder: Path, share: str | None, as_json: bool) -> None:
    """Run a study file, or a share of it, into a folder, and show what it found."""
    import jax  # noqa: PLC0415

    from gradflow.studies import results, study_file  # noqa: PLC0415

    part = None if share is None else _part(share)
    drawn = run(study_file.load(file), folder, part)
    if jax.process_index() > 0:
        return
    written = folder / results.FILE
    if as_json:
        print_json({"finished": True, "networks": drawn, "files": [str(written)]})
        return
    console = make_console()
    with results.opened(written) as dataset:
        _show(console, dataset.attrs["title"] or file.name, dataset)
    console.print(f"written   {written}; gradflow show {folder}")


def _part(text: str) -> Any:
    """Return the share that 2/8 means."""
    from gradflow.studies._plan import Share  # noqa: PLC0415
    from gradflow.studies._study import MOST_NETWORKS  # noqa: PLC0415

    place, slash, parts = text.partition("/")
    # No share is of more networks than there are numbers for.
    most = len(str(MOST_NETWORKS))
    known = slash and all(p.isdecimal() and len(p) <= most for p in (place, parts))
    if not (known and 1 <= int(place) <= int(parts) <= MOST_NETWORKS):
        raise InputError(
            f"share is {text[:60]!r}; it is which part of how many, from 1/1 on, as 2/8 for the "
            "second of eight"
        )
    return Share(int(place) - 1, int(parts))


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow study FILE --share 1/2 --out a`, elsewhere `gradflow study FILE --share 2/2 "
    "--out b`, then `gradflow merge a b --out whole`"
)
def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="The --out of every share.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the whole.", show_default=False)],
) -> None:
    """Put together the shares of a study that hosts drew without knowing of each other."""
    from gradflow.studies import execution, results  # noqa: PLC0415

    console = make_console()
    written = execution.merge(folders, out)
    with results.opened(written) as dataset:
        _show(console, dataset.attrs["title"], dataset)
    console.print(f"written   {written}; gradflow show {out}")


@contextmanager
def distributed(
    auto: bool, coordinator: str | None, processes: int, process: int
) -> Iterator[None]:
    """Join the other processes of `jax.distributed`, if that is asked for."""
    import jax  # noqa: PLC0415

    if not auto and coordinator is None:
        yield
        return
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the processes do not find each other ({reason}); give --coordinator HOST:PORT, "
            "--processes and --process to each"
        ) from error
    try:
        yield
    finally:
        jax.distributed.shutdown()


@app.command(
    epilog="Examples:\n\n- `gradflow show results/phase-diagram`\n- `gradflow show DIR --json`"
)
def show(folder: Folder, as_json: Json = False) -> None:
    """Show what a study has found, beside theory, or how far it is."""
    from gradflow.studies import results  # noqa: PLC0415
    from gradflow.studies.store import Store  # noqa: PLC0415

    store = Store.of(folder)
    study = store.study
    drawn = sum(store.rounds.networks().values())
    console = make_console()
    if store.results is None:
        told = {"title": study.title, "finished": False, "networks": drawn, "points": len(study)}
        if as_json:
            print_json(told)
            return
        console.print(f"study     {_one_line(study.title)}")
        console.print(f"progress  {drawn} networks of {len(study)} points; it is not finished")
        console.print(f"go on     gradflow study {folder / 'study.toml'} --out {folder}")
        return
    with results.opened(store.results) as dataset:
        if not as_json:
            _show(console, study.title, dataset)
            return
        rows = [results.agreement(dataset, name) for name in results.compared(dataset)]
    print_json(
        {"title": study.title, "finished": True, "networks": drawn, "points": len(study)}
        | {"statistics": rows}
    )


def _show(console: Console, title: str, dataset: xarray.Dataset) -> None:
    from gradflow.studies import results  # noqa: PLC0415

    axes = dataset.attrs["axes"].split()
    shape = " × ".join(f"{axis} ({dataset.sizes[axis]})" for axis in axes) or "one point"
    console.print(f"study     {_one_line(title)}")
    if dataset.attrs["question"]:
        console.print(f"question  {_one_line(dataset.attrs['question'])}")
    console.print(
        f"grid      {_one_line(shape)}, {dataset.sizes['layer']} layers; "
        f"{dataset.attrs['networks']:.0f} networks, {dataset.attrs['dtype']}"
    )
    table = Table(box=box.SIMPLE)
    table.add_column("statistic")
    for name in ("values", f"|z| < {results.LARGE:g}", "largest |z|", "there measured", "theory"):
        table.add_column(name, justify="right")
    table.add_column("where")
    shifted = any(f"{name}_finite_width_z" in dataset for name in results.compared(dataset))
    if shifted:
        table.add_column(f"|z| < {results.LARGE:g}, width known", justify="right")
    for name in results.compared(dataset):
        row = results.agreement(dataset, name)
        cells = [
            name,
            str(row["values"]),
            _share(row["within"]),
            f"{row['largest_z']:.3g}",
            f"{row['measured']:.5g}",
            f"{row['theory']:.5g}",
            ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row["where"].items()
            ),
        ]
        table.add_row(*cells, *([_share(row["within_finite_width"])] if shifted else []))
    console.print(table)


def _share(ratio: float) -> str:
    return "" if np.isnan(ratio) else f"{100 * ratio:.4g} %"


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow export results/phase-diagram --csv phase.csv`\n"
    "- `gradflow export results/phase-diagram --netcdf phase.nc`"
)
def export(
    folder: Folder,
    csv: Annotated[Path | None, typer.Option(help="A table, one line a point and layer.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="The same, as Parquet.")] = None,
    netcdf: Annotated[Path | None, typer.Option(help="Everything, labelled.")] = None,
) -> None:
    """Write what a study has found so far to a file of another kind."""
    from gradflow.studies import results  # noqa: PLC0415
    from gradflow.studies.store import Store  # noqa: PLC0415

    if not (csv or parquet or netcdf):
        raise InputError("no format is given; give --csv, --parquet or --netcdf, and a file")
    store = Store.of(folder)
    for name, target in {"csv": csv, "parquet": parquet, "netcdf": netcdf}.items():
        if target is not None:
            writable_file(target, name)
    if store.results is None:
        dataset = results.assemble(store)
    else:
        with results.opened(store.results) as found:
            dataset = found.load()
    table = dataset.drop_dims([d for d in dataset.dims if str(d).endswith("_bin")])
    for name, target in (("csv", csv), ("parquet", parquet)):
        if target is not None:
            _write_table(name, table.to_dataframe().reset_index(), target)
    if netcdf is not None:
        write_netcdf(dataset, netcdf)


@app.command(epilog="Examples:\n\n- `gradflow report results/phase-diagram`")
def report(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="The page; DIR/report.html without it.", show_default=False)
    ] = None,
) -> None:
    """Write a page on what a finished study has found: one file of HTML that needs nothing else."""
    from gradflow.studies import report as reports  # noqa: PLC0415
    from gradflow.studies import results  # noqa: PLC0415
    from gradflow.studies.store import Store  # noqa: PLC0415

    store = Store.of(folder)
    if store.results is None:
        raise InputError(f"the study in {str(folder)!r} is not finished; `gradflow show` says more")
    page = out or folder / "report.html"
    writable_file(page)
    with results.opened(store.results) as dataset:
        write_text(reports.page(dataset), page)
    make_console().print(f"written   {page}")


def _write_table(name: str, table: Any, path: Path) -> None:
    try:
        with complete(path, name) as beside:
            if name == "csv":
                table.to_csv(beside, index=False)
            else:
                table.to_parquet(beside, index=False)
    except ImportError as error:
        raise InputError(
            "parquet needs the package pyarrow, which is not installed; `pip install pyarrow`, or "
            "give --csv"
        ) from error


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let SIGINT and SIGTERM ask to stop; the second one stops at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say(
            f"finishing the chunk, for {GRACE:g} s at most; once more to stop at once, and the "
            "same command goes on from there"
        )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Report steps on standard error: a bar on a terminal, else a line now and then."""
    begun: dict[str, tuple[float, int]] = {}

    def rate(step: Any) -> float:
        """Return how many a second, since the first step that was seen of these."""
        now = time.perf_counter()
        start, done = begun.setdefault(step.what, (now, step.done))
        return (step.done - done) / (now - start) if now > start else float("nan")

    def said(step: Any) -> str:
        each = rate(step)
        parts = [f"{each:.3g} {step.what}/s"] if each > 0 else []
        if step.statistic:
            parts.append(f"|z| up to {step.largest_z:.2g} ({step.statistic})")
        return ", ".join(parts)

    if not sys.stderr.isatty():
        last: dict[str, float] = {}

        def line(step: Any) -> None:
            now, text = time.perf_counter(), said(step)
            if step.done < step.total and now - last.get(step.what, -_LINE_EVERY) < _LINE_EVERY:
                return
            last[step.what] = now
            each = rate(step)
            left = f", {_duration((step.total - step.done) / each)} left" if each > 0 else ""
            say(f"{step.done} of {step.total} {step.what}{left}{', ' if text else ''}{text}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def bar(step: Any) -> None:
            if step.what not in tasks:
                tasks[step.what] = bars.add_task(step.what, total=step.total, said="")
            task = tasks[step.what]
            bars.update(task, completed=step.done, total=step.total, said=said(step))

        yield bar


def _one_line(text: str) -> str:
    """Return what a file says without its newlines, which would pass for lines of our own."""
    return " ".join(text.split())


def _size(count: float) -> str:
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    return f"{count / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
