"""What an inspection finds: every layer measured, predicted and compared, and what it means."""

import dataclasses
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray
from rich.table import Table

from gradflow._differences import (
    StatisticComparison,
    Status,
)
from gradflow._files import write_netcdf, write_text
from gradflow._labels import key_of, labelled, layers, with_names
from gradflow._tables import PAGE, PlainConsole, number, table
from gradflow.estimation import Estimate
from gradflow.inspection import _wording
from gradflow.inspection._cure import Cure
from gradflow.inspection._leaves import Leaves, relative_theory
from gradflow.inspection._measuring.births import Born
from gradflow.inspection._places import Places
from gradflow.inspection._wording import BY_KEY
from gradflow.predictions import Prediction
from gradflow.verdict import Verdict

if TYPE_CHECKING:
    from gradflow.figures import Figure

__all__ = ["Inspection"]

# The most rows of a table of layers; of more layers so many are shown, evenly chosen.
_MOST_ROWS = 60
_SHOWN_ROWS = 40
_WORDS = {
    Status.NOT_COMPARED: "",
    Status.AGREES: "agrees",
    Status.FINITE_WIDTH: "finite width",
    Status.DIFFERS: "differs",
}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A model, read as it is: measured, predicted, and what becomes of its gradients.

    Attributes
    ----------
    verdict
        What becomes of the gradient, why, and what mends it; ``verdict.sentence`` says all of it.
    name, mode
        The model's name, and what was chosen for the user, as ``"train=True"``.
    places
        The layers: names, shapes, and where they stand.
    estimates
        Each statistic's `Estimate` over networks by its key, every array of shape (layers,).
    theory
        By key the values at infinite width, NaN where theory has none.
    by_statistic
        Both beside each other, by the statistic's key.
    leaves
        The parameters, with the sizes of weights and of gradients.
    networks
        How many networks were drawn; 1 of given weights, which have no standard errors.
    threshold
        The z-score beyond which a difference is significant.
    born
        Where the first value that is not finite comes from, or None.
    gradients_end
        Where measured gradients end and how to have them, in a sentence, or empty.
    cure
        Why gradients vanish or explode, by what to multiply which leaf of the parameters, what that
        does, and what known initialisations would do; None where it was not looked for.
    """

    verdict: Verdict
    name: str
    mode: str
    places: Places
    estimates: dict[str, Estimate]
    theory: Prediction
    by_statistic: dict[str, StatisticComparison]
    leaves: Leaves
    networks: int
    threshold: float
    born: Born | None = None
    gradients_end: str = ""
    cure: Cure | None = None

    def __getitem__(self, name: str) -> StatisticComparison:
        """A statistic's comparison, by its name or its key.

        Raises
        ------
        UnknownName
            If it was not compared.
        """
        return self.by_statistic[key_of(name, self.by_statistic)]

    @property
    def agreement(self) -> str:
        """One sentence on how theory and measurement agree."""
        return _wording.agreement(self.places, self.by_statistic, self.networks, self.threshold)

    @property
    def cause(self) -> str:
        """Why gradients vanish or explode, in a sentence; empty where they keep their size."""
        return "" if self.cure is None else self.cure.cause

    @property
    def factors(self) -> Mapping[str, float]:
        """By what to multiply each leaf of the parameters, by its path; empty if by nothing."""
        return {} if self.cure is None else self.cure.factors

    @property
    def remedies(self) -> str:
        """One sentence on what the factors do, and known initialisations; empty if all is well."""
        if self.cure is None or not self.cure.cause:
            return ""
        others = ", ".join(
            f"{trial.name} ×{number(trial.gradient, 3, log=True)}"
            for trial in self.cure.alternatives
        )
        known = f" From end to end others would make it {others}." if others else ""
        return f"{self.cure.effect}{known}"

    @property
    def theory_ends(self) -> str:
        """One sentence on how far theory reaches."""
        known = np.isfinite(self.theory.values["log_q"]).sum()
        sentence = f"theory reaches {known} of {len(self.places)} layers"
        why = self.theory.why_missing
        return f"{sentence}; {why}" if why else sentence

    @property
    def log_gradient_norms(self) -> dict[str, float]:
        """Log ‖∂C/∂W‖ of each leaf of the parameters, by its path: means over networks."""
        values = self.leaves.log_gradient + np.log(self.leaves.sizes) / 2
        return dict(zip(self.leaves.names, map(float, values), strict=True))

    @property
    def relative_weight_gradient(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log ‖∂C/∂W‖/‖W‖ of each layer, (layers,): measured, its standard error, and by theory."""
        weight, measured, error = self.leaves.at(self.places.parameters)
        return measured, error, relative_theory(self.theory.values, weight)

    def __repr__(self) -> str:
        """The verdict, the agreement, how far theory reaches, and what was inspected."""
        return "\n".join(self._sentences())

    def __str__(self) -> str:
        """The verdict first, the table of layers, and the other sentences."""
        text = io.StringIO()
        console = PlainConsole(PAGE, text)
        verdict, *rest = self._sentences()
        for part in (verdict, self.table(), *rest):
            console.print(part)
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """The sentences and the table, for a notebook."""
        verdict, *rest = map(html.escape, self._sentences())
        head, rows = self.rows()
        return (
            f"<p><b>{verdict}</b></p><p>{'<br>'.join(rest)}</p><table>"
            + "".join(
                f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
                for tag, row in (("th", head), *(("td", row) for row in rows))
            )
            + "</table>"
        )

    def _sentences(self) -> list[str]:
        mode = f", {self.mode}" if self.mode else ""
        drawn = f"{self.networks} networks" if self.networks > 1 else "the weights at hand"
        return [
            self.verdict.sentence,
            f"agreement: {self.agreement}",
            f"theory: {self.theory_ends}",
            *([f"gradients: {self.gradients_end}"] if self.gradients_end else []),
            *([f"remedies: {self.remedies}"] if self.remedies else []),
            f"{self.name}{mode}: {len(self.places)} layers, {len(self.leaves.names)} leaves of "
            f"parameters, {drawn}",
        ]

    def table(self) -> Table:
        """The layers as a table for the terminal, a row each; of very many, some."""
        head, rows = self.rows()
        some = f", {len(rows)} of {len(self.places)} layers" if len(rows) < len(self.places) else ""
        return table(
            f"{self.name}: measured, and beside it theory{some}",
            [dict(zip(head, row, strict=True)) for row in rows],
            text=("layer",),
        )

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table's head and its rows of text, one a layer; of very many, some."""
        head = (
            *("layer", "shape", "q", "theory", "flat/dead", "c", "theory ", "log₁₀\n‖∂C/∂z‖"),
            *("theory  ", "log₁₀\n‖∂C/∂W‖/‖W‖", "theory   ", "z", ""),
        )
        count = len(self.places)
        shown = range(count) if count <= _MOST_ROWS else np.linspace(0, count - 1, _SHOWN_ROWS)
        measured, _, predicted = self.relative_weight_gradient
        return head, [self._row(round(i), measured, predicted) for i in shown]

    def _row(self, layer: int, relative: np.ndarray, theory: np.ndarray) -> tuple[str, ...]:
        def pair(key: str) -> tuple[float, float]:
            estimate, log = self.estimates.get(key), key.startswith("log_") and BY_KEY[key].log
            if estimate is None:
                return math.nan, math.nan
            values = estimate.log_value if log else estimate.value
            return float(values[layer]), float(self.theory.values[key][layer])

        q, correlation, norm = (pair(key) for key in ("log_q", "correlation", "log_gradient_norm"))
        flat, dead = (100 * pair(key)[0] for key in ("saturation", "dead"))
        one, status = self._worst(layer)
        return (
            self.places.names[layer],
            "×".join(map(str, self.places.shapes[layer])),
            *(number(x, 3, log=True) for x in q),
            "-" if math.isnan(flat) else f"{flat:.0f}/{dead:.0f} %",
            *("-" if math.isnan(x) else f"{x:.3f}" for x in correlation),
            *(_log10(x) for x in norm),
            *(_log10(x[layer]) for x in (relative, theory)),
            "" if math.isnan(one) else f"{one:+.1f}",
            _WORDS[status],
        )

    def _worst(self, layer: int) -> tuple[float, Status]:
        """The largest z of a layer, and the worst status."""
        z = [float(one.z[layer]) for one in self.by_statistic.values()]
        known = [value for value in z if not math.isnan(value)]
        status = max((int(one.status[layer]) for one in self.by_statistic.values()), default=-1)
        return max(known, key=abs, default=math.nan), Status(status)

    def to_xarray(self) -> xarray.Dataset:
        """Everything, labelled.

        Each statistic ``<name>(layer)`` has ``<name>_standard_error``, ``<name>_theory``,
        ``<name>_z`` and the rest of its comparison, as a `Comparison` has; a quantity that is kept
        as a logarithm has that under ``log_<name>``. ``log_relative_gradient(parameter)`` is
        log ‖∂C/∂W‖/‖W‖ of each leaf, and ``log_relative_weight_gradient(layer)`` of each layer's.
        """
        arrays: dict[str, Any] = {}
        for key, estimate in self.estimates.items():
            statistic = BY_KEY[key]
            arrays[statistic.name] = estimate.value
            arrays[f"{statistic.name}_standard_deviation"] = estimate.standard_deviation
            arrays[f"{statistic.name}_standard_error"] = estimate.standard_error
            arrays[f"{statistic.name}_networks"] = estimate.count
            if statistic.log:
                arrays[key] = estimate.log_value
                arrays[f"{key}_standard_error"] = estimate.log_standard_error
        for name, values in with_names(self.theory.values).items():
            arrays[f"{name}_theory"] = np.asarray(values)
        for key, one in self.by_statistic.items():
            name = BY_KEY[key].name
            arrays[f"{name}_z"] = one.z
            arrays[f"{name}_relative_difference"] = one.relative_difference
        relative, error, predicted = self.relative_weight_gradient
        arrays["log_relative_weight_gradient"] = relative
        arrays["log_relative_weight_gradient_standard_error"] = error
        arrays["log_relative_weight_gradient_theory"] = predicted
        for name in ("width", "sites", "fan_in", "depth"):
            arrays[name] = getattr(self.places, name)
        arrays["on_trunk"] = self.places.on_trunk.astype(np.int8)
        dataset = xarray.Dataset(
            {name: ("layer", value) for name, value in arrays.items()},
            coords={
                "layer": layers(len(self.places)),
                "layer_name": ("layer", list(self.places.names)),
                "shape": ("layer", ["×".join(map(str, s)) for s in self.places.shapes]),
                "parameter": list(self.leaves.names),
            },
        )
        codes = {s.name.lower(): int(s) for s in Status}
        for key, one in self.by_statistic.items():
            dataset[f"{BY_KEY[key].name}_status"] = ("layer", one.status, codes)
        for name, values in (
            ("log_weight", self.leaves.log_weight),
            ("log_gradient", self.leaves.log_gradient),
            ("log_relative_gradient", self.leaves.log_relative),
            ("log_relative_gradient_standard_error", self.leaves.log_relative_error),
        ):
            dataset[name] = ("parameter", values)
        factors = [self.factors.get(name, 1.0) for name in self.leaves.names]
        dataset["factor"] = ("parameter", np.array(factors))
        return labelled(dataset, BY_KEY.values()).assign_attrs(
            model=self.name,
            model_mode=self.mode,  # scipy keeps its own ``mode`` beside attributes
            networks=self.networks,
            verdict=self.verdict.sentence,
            verdict_kind=self.verdict.kind,
            cause=self.cause,
            remedies=self.remedies,
            agreement=self.agreement,
            theory=self.theory_ends,
            gradients_end=self.gradients_end,
            z_threshold=self.threshold,
        )

    def figures(self) -> "dict[str, Figure]":
        """The figures of an inspection, by name: gradients by layer, and a bar for each leaf."""
        from gradflow import figures  # noqa: PLC0415  (matplotlib is slow to import)

        dataset = self.to_xarray()
        return {name: draw(dataset) for name, draw in figures.OF_INSPECTIONS.items()}

    def to_html(self) -> str:
        """One page of HTML without other files: the sentences, the tables and the figures."""
        from gradflow.inspection import _report  # noqa: PLC0415  (matplotlib is slow to import)

        return _report.page(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``results.nc``, ``report.html`` and the figures into a folder, and their paths.

        Raises
        ------
        InputError
            If a file cannot be written.
        """
        from gradflow import figures  # noqa: PLC0415  (matplotlib is slow to import)

        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        written = [write_netcdf(self.to_xarray(), into / "results.nc")]
        for name, figure in self.figures().items():
            written.append(figures.save(figure, into / f"{name.replace('_', '-')}.png"))
        return [*written, write_text(self.to_html(), into / "report.html")]

    def leaf_rows(self) -> list[tuple[str, ...]]:
        """A row of text for each leaf: path, log₁₀ of its relative gradient ± error, and factor."""
        return [
            (
                name,
                f"{_log10(relative)} ± {number(error / math.log(10), 1)}",
                number(self.factors[name], 4) if name in self.factors else "",
            )
            for name, relative, error in zip(
                self.leaves.names,
                self.leaves.log_relative,
                self.leaves.log_relative_error,
                strict=True,
            )
        ]


def _log10(log: float) -> str:
    return "-" if math.isnan(log) else f"{log / math.log(10):.2f}"
