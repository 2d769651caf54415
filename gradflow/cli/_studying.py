"""Commands on study files and their stores: study, plan, merge, show, export, report."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gradflow._checks import check_count
from gradflow._files import complete, write_netcdf, write_text
from gradflow._tables import table
from gradflow.cli import _noting
from gradflow.cli._options import (
    Json,
    Out,
    app,
    check_beside,
    check_instead,
    given_folder,
    is_given,
    writable_file,
)
from gradflow.cli._output import make_console, show
from gradflow.cli._running import distributed, duration, run
from gradflow.errors import InputError

if TYPE_CHECKING:
    import xarray

    from gradflow.studies import Study

File = Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="The --out of a `gradflow study FILE`.", show_default=False)
]
AllowImports = Annotated[
    bool, typer.Option("--allow-imports", help="Let the file import: activation = module:function.")
]
# Programs that `plan` lists, at most.
_LISTED = 20


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow study scripts/phase-diagram.toml --out results/phase-diagram`\n"
    "- `gradflow study FILE --share 2/8 --out part-2`\n"
    "- `gradflow study`"
)
def study(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(help="The study file (TOML); without it, as `note`.", show_default=False),
    ] = None,
    out: Out = None,
    auto: Annotated[
        bool, typer.Option("--distributed", help="Join the processes of SLURM or a cloud.")
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of the first process, to join others.")
    ] = None,
    processes: Annotated[int, typer.Option(help="How many processes there are.")] = 1,
    process: Annotated[int, typer.Option(help="Which of them this is, from 0 on.")] = 0,
    share: Annotated[
        str | None,
        typer.Option(help="Draw a part, as 2/8; `gradflow merge` puts all together."),
    ] = None,
    allow_imports: AllowImports = False,
    as_json: Json = False,
) -> None:
    """Draw what a study file describes, a grid of random networks, and compare it with theory.

    After an interruption of any kind the same command resumes; with more networks it adds those.
    With any other change it takes another --out.

    Without a FILE it is the main job, `gradflow note`, with its default numbers.
    """
    if file is None:
        for option in ("auto", "coordinator", "processes", "process", "share", "allow_imports"):
            if is_given(context, option):
                name = {"auto": "distributed"}.get(option, option).replace("_", "-")
                raise InputError(
                    f"--{name} goes with a study file; the main job's is scripts/paper.toml"
                )
        _noting.note(out=out, as_json=as_json)
        return
    check_instead(context, "coordinator", "auto")
    check_beside(context, "processes", "coordinator")
    check_beside(context, "process", "coordinator")
    if not 0 <= process < check_count("processes", processes):
        raise InputError(
            f"process is {process} and processes is {processes}; it is from 0 to one less"
        )
    folder = given_folder(out, Path("results") / file.stem)
    with distributed(auto, coordinator, processes, process):
        from gradflow.studies import _study_file  # noqa: PLC0415  (JAX is slow to import)

        described = _study_file.load(file, allow_imports=allow_imports)
        _run_file(described, file.name, folder, share, as_json)


def _run_file(
    described: "Study", name: str, folder: Path, share: str | None, as_json: bool
) -> None:
    """Run a study, or a share of it, into a folder, and show the results."""
    import jax  # noqa: PLC0415

    from gradflow.studies import _results  # noqa: PLC0415

    part = None if share is None else _part(share)
    networks = run(described, folder, part)
    if jax.process_index() > 0:
        return
    written = folder / _results.FILE
    report = {"finished": True, "networks": networks, "files": [str(written)]}

    def parts() -> Iterator[Table | str]:
        with _results.open_results(written) as dataset:
            yield from _results_in_words(dataset.attrs["title"] or name, dataset)
        yield f"written   {written}; gradflow show {folder}"

    show(report, parts, as_json=as_json)


def _part(text: str) -> Any:
    """The share that a text as 2/8 means."""
    from gradflow.studies._plan import Share  # noqa: PLC0415
    from gradflow.studies._study import MOST_NETWORKS  # noqa: PLC0415

    number, slash, parts = text.partition("/")
    # No share is of more networks than there are numbers for.
    most = len(str(MOST_NETWORKS))
    known = slash and all(p.isdecimal() and len(p) <= most for p in (number, parts))
    if not (known and 1 <= int(number) <= int(parts) <= MOST_NETWORKS):
        raise InputError(
            f"share is {text[:60]!r}; it is which part of how many, from 1/1 on, as 2/8 for the "
            "second of eight"
        )
    return Share(int(number) - 1, int(parts))


@app.command(
    epilog="Examples:\n\n"
    "- `gradflow plan scripts/phase-diagram.toml`\n"
    "- `gradflow plan study.toml --json`"
)
def plan(file: File, allow_imports: AllowImports = False, as_json: Json = False) -> None:
    """Say what a study file would take: programs, networks, memory and time; nothing is run."""
    from gradflow.studies import _plan, _results, _study_file  # noqa: PLC0415

    described = _study_file.load(file, allow_imports=allow_imports)
    made = _plan.first_round(described)
    _results.check(described)
    sampling = described.sampling
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
    report = {
        "title": described.title,
        "points": len(described),
        "axes": {axis.name: len(axis) for axis in described.axes},
        "programs": len(rows),
        "networks": made.networks,
        "most_networks": len(described) * sampling.most if sampling.target else made.networks,
        "chunk_bytes": made.chunk_bytes,
        "output_bytes": made.output_bytes,
        "seconds": round(made.seconds, 1),
        "groups": rows,
    }

    def parts() -> Iterator[Table | str]:
        shape = " × ".join(f"{axis.name} ({len(axis)})" for axis in described.axes) or "one point"
        first = " in the first round" if sampling.target else ""
        yield f"study     {_one_line(described.title or file.name)}"
        yield f"grid      {_one_line(shape)}: {len(described)} points"
        shown = [{n: str(v) for n, v in row.items() if n != "why"} for row in rows[:_LISTED]]
        yield table("programs", shown, text=("activation", "sampler"))
        if len(rows) > _LISTED:
            yield f"          … and {len(rows) - _LISTED} more programs"
        yield f"compiles  {len(rows)} programs, and those of the theory"
        yield f"networks  {made.networks}{first}"
        if sampling.target:
            yield f"at most   {report['most_networks']}, until every target is met"
        yield f"memory    {_size(made.chunk_bytes)} a chunk, {_size(made.available)} free"
        yield f"results   {_size(made.output_bytes)}"
        yield f"time      about {duration(made.seconds)}{first}, on this machine"

    show(report, parts, as_json=as_json)


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
    from gradflow.studies import _execution, _results  # noqa: PLC0415

    console = make_console()
    written = _execution.merge(folders, out)
    with _results.open_results(written) as dataset:
        for part in _results_in_words(dataset.attrs["title"], dataset):
            console.print(part)
    console.print(f"written   {written}; gradflow show {out}")


@app.command(
    name="show",
    epilog="Examples:\n\n- `gradflow show results/phase-diagram`\n- `gradflow show DIR --json`",
)
def show_study(folder: Folder, as_json: Json = False) -> None:
    """Show the results of a study, beside theory, or how far it is."""
    from gradflow.studies import _results  # noqa: PLC0415
    from gradflow.studies._store import Store  # noqa: PLC0415

    store = Store.of(folder)
    described = store.study
    report: dict[str, Any] = {
        "title": described.title,
        "finished": store.results is not None,
        "networks": sum(store.rounds.networks().values()),
        "points": len(described),
    }
    if store.results is None:

        def progress() -> Iterator[Table | str]:
            yield f"study     {_one_line(described.title)}"
            yield (
                f"progress  {report['networks']} networks of {report['points']} points; it is not "
                "finished"
            )
            yield f"go on     gradflow study {folder / 'study.toml'} --out {folder}"

        show(report, progress, as_json=as_json)
        return
    with _results.open_results(store.results) as dataset:
        if as_json:
            names = _results.compared(dataset)
            report["statistics"] = [_results.agreement(dataset, name) for name in names]
            report["no_theory"] = dataset.attrs.get("no_theory")
        show(report, lambda: _results_in_words(described.title, dataset), as_json=as_json)


def _results_in_words(title: str, dataset: "xarray.Dataset") -> Iterator[Table | str]:
    """What a finished study has: its grid, and by statistic how measurement and theory agree."""
    from gradflow.studies import _results  # noqa: PLC0415

    axes = dataset.attrs["axes"].split()
    shape = " × ".join(f"{axis} ({dataset.sizes[axis]})" for axis in axes) or "one point"
    yield f"study     {_one_line(title)}"
    if dataset.attrs["question"]:
        yield f"question  {_one_line(dataset.attrs['question'])}"
    yield (
        f"grid      {_one_line(shape)}, {dataset.sizes['layer']} layers; "
        f"{dataset.attrs['networks']:.0f} networks, {dataset.attrs['dtype']}"
    )
    if "no_theory" in dataset.attrs:
        yield f"no theory {_one_line(dataset.attrs['no_theory'])}"
    names = _results.compared(dataset)
    shifted = any(f"{name}_finite_width_z" in dataset for name in names)
    rows = []
    for name in names:
        row = _results.agreement(dataset, name)
        where = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["where"].items()
        )
        cells = {
            "statistic": name,
            "values": str(row["values"]),
            f"|z| < {_results.LARGE:g}": _share(row["within"]),
            "largest |z|": f"{row['largest_z']:.3g}",
            "there measured": f"{row['measured']:.5g}",
            "theory": f"{row['theory']:.5g}",
            "where": ", ".join(where),
        }
        if shifted:
            cells[f"|z| < {_results.LARGE:g}, width known"] = _share(row["within_finite_width"])
        rows.append(cells)
    yield table("measured beside theory", rows, text=("statistic", "where"))


def _share(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{100 * ratio:.4g} %"


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
    """Write the results of a study so far to a file of another kind."""
    from gradflow.studies import _results  # noqa: PLC0415
    from gradflow.studies._store import Store  # noqa: PLC0415

    if not (csv or parquet or netcdf):
        raise InputError("no format is given; give --csv, --parquet or --netcdf, and a file")
    store = Store.of(folder)
    for name, target in {"csv": csv, "parquet": parquet, "netcdf": netcdf}.items():
        if target is not None:
            writable_file(target, name)
    if store.results is None:
        dataset = _results.assemble(store)
    else:
        with _results.open_results(store.results) as labelled:
            dataset = labelled.load()
    plain = dataset.drop_dims([d for d in dataset.dims if str(d).endswith("_bin")])
    for name, target in (("csv", csv), ("parquet", parquet)):
        if target is not None:
            _write_table(name, plain.to_dataframe().reset_index(), target)
    if netcdf is not None:
        write_netcdf(dataset, netcdf)


@app.command(epilog="Examples:\n\n- `gradflow report results/phase-diagram`")
def report(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="The page; DIR/report.html without it.", show_default=False)
    ] = None,
) -> None:
    """Write a page on the results of a finished study: one file of HTML that needs nothing else."""
    from gradflow.studies import _report as reports  # noqa: PLC0415
    from gradflow.studies import _results  # noqa: PLC0415
    from gradflow.studies._store import Store  # noqa: PLC0415

    store = Store.of(folder)
    if store.results is None:
        raise InputError(f"the study in {str(folder)!r} is not finished; `gradflow show` says more")
    page = out or folder / "report.html"
    writable_file(page)
    with _results.open_results(store.results) as dataset:
        write_text(reports.page(dataset), page)
    make_console().print(f"written   {page}")


def _write_table(name: str, frame: Any, path: Path) -> None:
    try:
        with complete(path, name) as beside:
            if name == "csv":
                frame.to_csv(beside, index=False)
            else:
                frame.to_parquet(beside, index=False)
    except ImportError as error:
        raise InputError(
            "parquet needs the package pyarrow, which is not installed; `pip install pyarrow`, or "
            "give --csv"
        ) from error


def _one_line(text: str) -> str:
    """A file's text without its newlines, which would pass for lines of our own."""
    return " ".join(text.split())


def _size(count: float) -> str:
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    return f"{count / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
