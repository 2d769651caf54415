"""Numbers of experiments in words, for tables and findings."""

import numpy as np
import xarray


def geometric_mean(values: xarray.DataArray, over: str = "seed") -> xarray.DataArray:
    """The geometric mean over networks whose values are finite in all layers."""
    with np.errstate(divide="ignore"):
        logs = xarray.ufuncs.log(values)
    usable = logs < np.inf  # a network that has not moved is -inf
    if "layer" in values.dims:
        usable = usable.all("layer")
    return np.exp(logs.where(usable).mean(over))


def sizes(dataset: xarray.Dataset) -> str:
    """The sizes of networks and of their training in a few words."""
    attrs = dataset.attrs
    return (
        f"layers of {attrs['width']} and one of {attrs['classes']}, {attrs['steps']} steps of "
        f"{attrs['batch']}, {dataset.sizes['seed']} networks of each"
    )


def percent(values: xarray.DataArray, over: str = "seed") -> str:
    """Mean ± standard deviation over networks, in per cent."""
    deviation = f" ± {100 * float(values.std(over, ddof=1)):.1f}" if values.sizes[over] > 1 else ""
    return f"{100 * float(values.mean(over)):.1f}{deviation} %"


def error_columns(error: xarray.DataArray) -> dict[str, float]:
    """Columns of a table: the mean, the least and the largest error over networks, in per cent."""
    columns = {"error, %": error.mean(), "least": error.min(), "most": error.max()}
    return {name: 100 * float(value) for name, value in columns.items()}


def ranges(layers: np.ndarray) -> str:
    """The numbers of layers in a few words: layer 3, layers 1 to 3 and 7."""
    parts: list[list[int]] = []
    for number in layers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts]
    if not words:
        return "no layer"
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"layer{'s' if len(layers) > 1 else ''} {listed}"
