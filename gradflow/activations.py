"""Activations: a function φ, where it is not smooth, and its Gaussian averages in closed form.

To add one, assign one `Activation` at module level: `ALL`, `get`, and the shared law tests find it.
`_family` gives it parameters, and a second assignment another name.
Derivatives are never written here: φ' and φ'' come from JAX. Where JAX loses digits (1 - tanh² and
1 - sigmoid vanish in the tails) the function itself is written so that it does not: simulation and
theory differentiate the same function.

Closed forms are optional: for x ~ N(0, q), or for (u, v) Gaussian with variances q_u, q_v and
covariance k. They are written so that nothing cancels for q from 0 to 1e4; a form that would is
left to the quadrature of `gradflow.gaussian`. Those that take more than a line, with their sources,
are in `gradflow._closed_forms`.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf as _erf
from jaxtyping import Array

from gradflow import _closed_forms, _imports
from gradflow._activation import Activation, Elementwise
from gradflow._checks import check_sequence, is_number, unknown_name
from gradflow.errors import InputError

__all__ = ["ALIASES", "ALL", "Activation", "ActivationLike", "custom", "get", "leaky_relu"]

# What `get` takes: an activation, its name, or a function that is one.
ActivationLike: TypeAlias = Activation | str | Elementwise

# By name: what makes an activation of its parameters, which have a default each.
_FAMILIES: dict[str, Callable[..., Activation]] = {}


def _family(phi: Activation, factors: Callable[..., tuple[float, float]]) -> Activation:
    """Give φ parameters, by whose factors (a, b) a φ(b x) is made; by default that is φ itself."""

    @functools.wraps(factors)
    def make(*parameters: float) -> Activation:
        output, argument = factors(*parameters)
        if not (0.01 <= argument <= 100 and output):
            raise ValueError(parameters)
        return phi.scaled(output, argument, phi.name)

    _FAMILIES[phi.name] = make
    return phi


def custom(
    function: Elementwise, *, kinks: Iterable[float] = (), name: str | None = None
) -> Activation:
    """Return an `Activation` of any elementwise function written in JAX.

    Parameters
    ----------
    function
        φ: takes an array and returns one of the same shape.
    kinks
        Points where φ or a derivative of it is not smooth. Averages lose digits if one is missing.
    name
        Its name in results; the function's own by default.

    Raises
    ------
    InputError
        If the function is not elementwise, not finite, or not differentiable by JAX.
    """
    name = name or str(getattr(function, "__name__", "custom"))
    probes = np.array([-2.7, -1.1, -0.3, 0.4, 1.3, 2.9])
    wrapped = Activation(name, function, _kinks(kinks))
    problem = f"activation {name!r} must be an elementwise function written in JAX, but it"
    try:
        with _concrete():
            x = jnp.asarray(probes)
            value, slope = wrapped(x), wrapped.derivative(x)
            single = [wrapped(probe) for probe in x]
    except Exception as error:
        raise InputError(f"{problem} raised {type(error).__name__} on an array") from error
    if jnp.shape(value) != probes.shape or any(jnp.shape(s) != () for s in single):
        raise InputError(f"{problem} changed the shape of its argument")
    if any(isinstance(v, jax.core.Tracer) for v in (value, slope, *single)):
        return wrapped  # its parameters are being differentiated, or mapped over
    if not np.allclose(value, np.asarray(single), rtol=1e-5, atol=1e-7, equal_nan=True):
        raise InputError(f"{problem} mixed the entries of its argument")
    if not (np.isfinite(value).all() and np.isfinite(slope).all()):
        raise InputError(f"{problem} or its derivative was not finite on {probes.tolist()}")
    return wrapped


@contextmanager
def _concrete() -> Iterator[None]:
    """Evaluate at once and in float64, also while a caller's function is being traced."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        yield


def _kinks(kinks: Any) -> tuple[float, ...]:
    sequence = check_sequence("kinks", kinks, "numbers, where φ is not smooth, as (0.0,)")
    try:
        return tuple(float(kink) for kink in sequence)
    except (TypeError, ValueError) as error:
        raise InputError(f"kinks is {kinks!r}; it is numbers, where φ is not smooth") from error


def get(activation: ActivationLike) -> Activation:
    """Return the activation of this name, or a callable as an `Activation`.

    Names are read in any case, with or without underscores, and those of PyTorch, Keras and JAX are
    known: ``"swish"`` is `silu`, and so is `jax.nn.silu` itself. Parameters stand in brackets, as
    in ``"elu(0.5)"``, ``"sin(30)"`` or ``"tanh(1.7159, 2/3)"``, which is 1.7159 tanh(2x/3); one
    alone also follows an underscore, as in ``"leaky_relu_0.2"``, which a shell takes without
    quotes. Equal parameters give one object. ``"module:function"`` is a function of your own, at
    the command line alone, where naming it may import it.

    Raises
    ------
    InputError
        If there is no such name, a parameter is none, or the callable is not fit (see `custom`).
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return _by_name(activation)
    if callable(activation):
        return _known_function(activation) or custom(activation)
    raise InputError(f"activation is {activation!r}; it is a name or an elementwise function")


# What was imported, by its text: nobody needs to allow it again.
_IMPORTED: dict[str, Activation] = {}


def _not_imported(x: Array) -> Array:  # noqa: ARG001
    raise InputError("activation is a function that was not imported; --allow-imports imports it")


def _by_name(text: str) -> Activation:
    if ":" in text:
        if text not in _IMPORTED:
            function = _imports.function_at(text)
            if function is None:
                return Activation(text, _not_imported)
            if isinstance(function, Activation):  # with its kinks
                _IMPORTED[text] = replace(function, name=text)
            else:
                _IMPORTED[text] = _known_function(function) or custom(function, name=text)
        return _IMPORTED[text]
    key, arguments = _key(text), None
    if key not in _NAMES and (
        parsed := re.fullmatch(r"(.+?)\((.*)\)", text.strip())
        or re.fullmatch(r"(.+)_(-?\d*\.?\d+)", text.strip())
    ):
        key, arguments = _key(parsed[1]), parsed[2]
    if reason := _REFUSED.get(key):
        raise InputError(f"activation is {text!r}, {reason}")
    if key not in _NAMES:
        raise unknown_name("activation", text, (*_BY_NAME, *ALIASES, "module:function"))
    name = _NAMES[key]
    if arguments is None:
        return _BY_NAME[name] if name in _BY_NAME else get(name)
    family = name.partition("(")[0]
    if family not in _FAMILIES:
        raise InputError(f"activation is {text!r}; {family} has no parameters")
    return _with_parameters(family, text, arguments.split(","))


def _key(name: str) -> str:
    """A name without what people write in different ways: HardTanh, hard-tanh, hardtanh."""
    return re.sub(r"[\s_-]", "", name).lower()


def _with_parameters(family: str, text: str, arguments: list[str]) -> Activation:
    """The activation of a family with the parameters that are written."""
    parameters = inspect.signature(_FAMILIES[family]).parameters
    try:
        values = tuple(map(_number, arguments))
    except (ValueError, ZeroDivisionError):
        values = ()
    if not 0 < len(values) <= len(parameters):
        raise InputError(
            f"activation is {text!r}; it is {family}({', '.join(parameters)}), with a number for "
            "each parameter"
        )
    rest = tuple(p.default for p in parameters.values())[len(values) :]
    try:
        return _member(family, *values, *rest)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"activation is {text!r}, of parameters beyond those that averages are known to be "
            "right for; they scale x by 0.01 to 100, and φ by no 0"
        ) from error


def _number(text: str) -> float:
    """The finite number that a text as 0.5 or 2/3 is."""
    numerator, slash, denominator = text.partition("/")
    value = float(numerator) / (float(denominator) if slash else 1)
    if not math.isfinite(value):
        raise ValueError(value)
    return value


@functools.cache  # equal parameters give one object, so that jit caches do not miss
def _member(family: str, *values: float) -> Activation:
    defaults = [p.default for p in inspect.signature(_FAMILIES[family]).parameters.values()]
    if family in _BY_NAME:
        while values and values[-1] == defaults[len(values) - 1]:
            values = values[:-1]
        if not values:
            return _BY_NAME[family]
    written = (f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in values)
    return replace(_FAMILIES[family](*values), name=f"{family}({', '.join(written)})")


def _known_function(function: Elementwise) -> Activation | None:
    """The activation that a function of JAX is, or None."""
    if isinstance(function, functools.partial) and function.func is jax.nn.gelu:
        exact = function.keywords == {"approximate": False}
        return gelu if exact and not function.args else None
    try:
        return _BY_FUNCTION.get(function)
    except TypeError:  # it cannot be hashed
        return None


def _piecewise_linear(name: str, function: Elementwise, a: float) -> Activation:
    """Slope 1 for x > 0 and a for x < 0: φ = (1+a)/2 x + (1-a)/2 |x|."""
    odd, even = ((1 + a) / 2) ** 2, ((1 - a) / 2) ** 2

    def kernel(q_u: Array, q_v: Array, k: Array) -> Array:
        # E|u||v| = (2/π)(√(q_u q_v - k²) + k (π/2 - angle)); Cho & Saul 2009, order 1.
        root = jnp.sqrt(_closed_forms.gram_determinant(q_u, q_v, k))
        angle = _closed_forms.angle(q_u, q_v, k)
        return odd * k + even * (2 * (root - k * angle) / math.pi + k)

    def derivative_kernel(q_u: Array, q_v: Array, k: Array) -> Array:
        return odd + even * (1 - 2 * _closed_forms.angle(q_u, q_v, k) / math.pi)

    return Activation(
        name,
        function,
        kinks=() if a == 1 else (0.0,),
        homogeneous=True,
        moments={
            "phi": lambda q: (1 - a) * jnp.sqrt(q / (2 * math.pi)),
            "phi2": lambda q: (1 + a**2) / 2 * q,
            "phi4": lambda q: (1 + a**4) / 2 * 3 * q**2,
            "dphi": lambda q: (1 + a) / 2,  # noqa: ARG005
            "dphi2": lambda q: (1 + a**2) / 2,  # noqa: ARG005
            "dphi4": lambda q: (1 + a**4) / 2,  # noqa: ARG005
            "x_phi": lambda q: (1 + a) / 2 * q,
            "x_phi_dphi": lambda q: (1 + a**2) / 2 * q,
            "phi_ddphi": lambda q: 0.0,  # noqa: ARG005
            "phi2_dphi2": lambda q: (1 + a**4) / 2 * q,
            "ddphi2": lambda q: 0.0 if a == 1 else math.inf,  # noqa: ARG005
            "variance": lambda q: ((1 + a**2) / 2 - (1 - a) ** 2 / (2 * math.pi)) * q,
        },
        kernel=kernel,
        derivative_kernel=derivative_kernel,
    )


# Functions that JAX differentiates with a loss of digits -----------------------------------------


@jax.custom_jvp
def _logistic(x: Array) -> Array:
    return jax.nn.sigmoid(x)


@jax.custom_jvp
def _logistic_slope(x: Array) -> Array:
    # s(x) s(-x), where s (1 - s) is 0 for x > 17 in float32.
    return _logistic(x) * _logistic(-x)


@jax.custom_jvp
def _tanh(x: Array) -> Array:
    return jnp.tanh(x)


# s' = s(x) s(-x), (s')' = -s' tanh(x/2), tanh' = 4 s'(2x), where 1 - tanh² is 0 for |x| > 9 in
# float32. The rules are written with each other, so every order of derivative keeps its digits.
_logistic.defjvps(lambda x_dot, _, x: _logistic_slope(x) * x_dot)
_logistic_slope.defjvps(lambda x_dot, slope, x: -slope * _tanh(x / 2) * x_dot)
_tanh.defjvps(lambda x_dot, _, x: 4 * _logistic_slope(2 * x) * x_dot)


def _gelu_tanh(x: Array) -> Array:
    # (1 + tanh y)/2 = s(2y)
    return x * _logistic(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


# The activations ---------------------------------------------------------------------------------

linear = replace(
    _piecewise_linear("linear", lambda x: x, 1.0),
    kernel=lambda q_u, q_v, k: k,  # noqa: ARG005
    derivative_kernel=lambda q_u, q_v, k: 1.0,  # noqa: ARG005
)
relu = _piecewise_linear("relu", jax.nn.relu, 0.0)


def leaky_relu(slope: float = 0.01) -> Activation:
    """Return max(x, 0) + slope · min(x, 0).

    Raises
    ------
    InputError
        If the slope is not finite.
    """
    if not (is_number(slope) and math.isfinite(slope)):
        raise InputError(f"the slope of leaky_relu is {slope!r}; it is a finite number")
    return _member("leaky_relu", float(slope))


def _leaky_relu(slope: float = 0.01) -> Activation:
    return _piecewise_linear("leaky_relu", lambda x: jax.nn.leaky_relu(x, slope), slope)


def _elu(alpha: float = 1.0) -> Activation:
    return Activation("elu", functools.partial(jax.nn.elu, alpha=alpha), kinks=(0.0,))


_FAMILIES |= {"leaky_relu": _leaky_relu, "elu": _elu}
elu = _elu()
celu = _family(Activation("celu", jax.nn.celu, kinks=(0.0,)), lambda alpha=1.0: (alpha, 1 / alpha))
selu = Activation("selu", jax.nn.selu, kinks=(0.0,))
squared_relu = Activation(
    "squared_relu",
    lambda x: jnp.square(jax.nn.relu(x)),
    kinks=(0.0,),
    moments={
        "phi": lambda q: q / 2,
        "phi2": lambda q: 3 / 2 * q**2,
        "phi4": lambda q: 105 / 2 * q**4,
        "dphi": lambda q: jnp.sqrt(2 * q / math.pi),
        "dphi2": lambda q: 2 * q,
        "dphi4": lambda q: 24 * q**2,
        "x_phi": lambda q: jnp.sqrt(2 * q / math.pi) * q,
        "x_phi_dphi": lambda q: 3 * q**2,
        "phi_ddphi": lambda q: q,
        "phi2_dphi2": lambda q: 30 * q**3,
        "ddphi2": lambda q: 2.0,  # noqa: ARG005
        "variance": lambda q: 5 / 4 * q**2,
    },
)
gelu = Activation(
    "gelu",
    functools.partial(jax.nn.gelu, approximate=False),
    moments={
        "phi": lambda q: q * jax.lax.rsqrt(2 * math.pi * (1 + q)),
        "phi2": _closed_forms.gelu_phi2,
        "dphi": lambda q: 0.5,  # noqa: ARG005
        "dphi2": _closed_forms.gelu_dphi2,
        "x_phi": lambda q: q / 2,
        "x_phi_dphi": _closed_forms.gelu_x_phi_dphi,
    },
    kernel=_closed_forms.gelu_kernel,
    derivative_kernel=_closed_forms.gelu_derivative_kernel,
)
gelu_tanh = Activation("gelu_tanh", _gelu_tanh)
silu = _family(Activation("silu", lambda x: x * _logistic(x)), lambda beta=1.0: (1 / beta, beta))
softplus = _family(Activation("softplus", jax.nn.softplus), lambda beta=1.0: (1 / beta, beta))
mish = Activation("mish", lambda x: x * _tanh(jax.nn.softplus(x)))
tanh = _family(Activation("tanh", _tanh), lambda a=1.0, b=1.0: (a, b))
logistic = Activation("logistic", _logistic)
log_sigmoid = Activation("log_sigmoid", jax.nn.log_sigmoid)
hard_tanh = Activation(
    "hard_tanh",
    jax.nn.hard_tanh,
    kinks=(-1.0, 1.0),
    moments=dict.fromkeys(("dphi", "dphi2", "dphi4"), _closed_forms.hard_tanh_inside),
)
# As PyTorch, JAX and Keras 3 have them: relu6(x + 3)/6, with a slope of 1/6 (Keras 2 had 1/5).
hard_sigmoid = Activation("hard_sigmoid", jax.nn.hard_sigmoid, kinks=(-3.0, 3.0))
hard_swish = Activation("hard_swish", jax.nn.hard_swish, kinks=(-3.0, 3.0))
relu6 = Activation("relu6", jax.nn.relu6, kinks=(0.0, 6.0))
softsign = Activation("softsign", jax.nn.soft_sign, kinks=(0.0,))
erf = _family(
    Activation(
        "erf",
        _erf,
        moments={
            "phi": lambda q: 0.0,  # noqa: ARG005
            "phi2": lambda q: 2 / math.pi * jnp.arctan(2 * q * jax.lax.rsqrt(1 + 4 * q)),
            "dphi": lambda q: 2 * jax.lax.rsqrt(math.pi * (1 + 2 * q)),
            "dphi2": lambda q: 4 / math.pi * jax.lax.rsqrt(1 + 4 * q),
            "dphi4": lambda q: 16 / math.pi**2 * jax.lax.rsqrt(1 + 8 * q),
            "x_phi": lambda q: 2 * q * jax.lax.rsqrt(math.pi * (1 + 2 * q)),
            "x_phi_dphi": lambda q: 4 / math.pi * q / (1 + 2 * q) * jax.lax.rsqrt(1 + 4 * q),
            "phi_ddphi": lambda q: -8 / math.pi * q / (1 + 2 * q) * jax.lax.rsqrt(1 + 4 * q),
            "phi2_dphi2": lambda q: (
                8
                / math.pi**2
                * jax.lax.rsqrt(1 + 4 * q)
                * jnp.arctan(2 * q * jax.lax.rsqrt((1 + 4 * q) * (1 + 8 * q)))
            ),
            "ddphi2": lambda q: 16 / math.pi * q * jax.lax.rsqrt(1 + 4 * q) / (1 + 4 * q),
        },
        kernel=_closed_forms.erf_kernel,
        derivative_kernel=_closed_forms.erf_derivative_kernel,
    ),
    lambda a=1.0, b=1.0: (a, b),
)
sin = _family(
    Activation(
        "sin",
        jnp.sin,
        moments={
            "phi": lambda q: 0.0,  # noqa: ARG005
            "phi2": _closed_forms.sin2,
            "phi4": _closed_forms.sin4,
            "dphi": lambda q: jnp.exp(-q / 2),
            "dphi2": _closed_forms.cos2,
            "dphi4": _closed_forms.cos4,
            "x_phi": lambda q: q * jnp.exp(-q / 2),
            "x_phi_dphi": lambda q: q * jnp.exp(-2 * q),
            "phi_ddphi": lambda q: -_closed_forms.sin2(q),
            "phi2_dphi2": _closed_forms.sin2_cos2,
            "ddphi2": _closed_forms.sin2,
            "variance": _closed_forms.sin2,
        },
        kernel=_closed_forms.sin_sin,
        derivative_kernel=_closed_forms.cos_cos,
    ),
    lambda omega=1.0: (1.0, omega),
)
cos = _family(
    Activation(
        "cos",
        jnp.cos,
        moments={
            "phi": lambda q: jnp.exp(-q / 2),
            "phi2": _closed_forms.cos2,
            "phi4": _closed_forms.cos4,
            "dphi": lambda q: 0.0,  # noqa: ARG005
            "dphi2": _closed_forms.sin2,
            "dphi4": _closed_forms.sin4,
            "x_phi": lambda q: 0.0,  # noqa: ARG005
            "x_phi_dphi": lambda q: -q * jnp.exp(-2 * q),
            "phi_ddphi": lambda q: -_closed_forms.cos2(q),
            "phi2_dphi2": _closed_forms.sin2_cos2,
            "ddphi2": _closed_forms.cos2,
            "variance": lambda q: jnp.expm1(-q) ** 2 / 2,
        },
        kernel=_closed_forms.cos_cos,
        derivative_kernel=_closed_forms.sin_sin,
    ),
    lambda omega=1.0: (1.0, omega),
)
# x + sin²(a x)/a: Ziyin et al. 2020, arXiv:2006.08195.
snake = _family(
    Activation(
        "snake",
        lambda x: x + jnp.square(jnp.sin(x)),
        moments={
            "phi": _closed_forms.sin2,
            "phi2": lambda q: q + _closed_forms.sin4(q),
            "phi4": _closed_forms.snake_phi4,
            "dphi": lambda q: 1.0,  # noqa: ARG005
            "dphi2": lambda q: 1 + _closed_forms.sin2(4 * q),
            "dphi4": lambda q: 1 + 6 * _closed_forms.sin2(4 * q) + _closed_forms.sin4(4 * q),
            "x_phi": lambda q: q,
            "x_phi_dphi": lambda q: q * (1 + _closed_forms.snake_mixed(q)),
            "phi_ddphi": _closed_forms.snake_phi_ddphi,
            "phi2_dphi2": _closed_forms.snake_phi2_dphi2,
            "ddphi2": lambda q: 4 * _closed_forms.cos2(4 * q),
            "variance": lambda q: q + jnp.expm1(-4 * q) ** 2 / 8,
        },
        kernel=_closed_forms.snake_kernel,
        derivative_kernel=lambda q_u, q_v, k: 1 + _closed_forms.sin_sin(4 * q_u, 4 * q_v, 4 * k),
    ),
    lambda a=1.0: (1 / a, a),
)

# Names and functions ------------------------------------------------------------------------------

_BY_NAME = {name: value for name, value in list(vars().items()) if isinstance(value, Activation)}
# Other names, those of PyTorch, Keras and JAX among them.
ALIASES = {
    "sigmoid": "logistic",
    "expit": "logistic",
    "identity": "linear",
    "swish": "silu",
    "quick_gelu": "silu(1.702)",
    "hard_silu": "hard_swish",
    "leaky_relu": "leaky_relu(0.01)",
    "prelu": "leaky_relu(0.25)",
    "relu2": "squared_relu",
    "gelu(tanh)": "gelu_tanh",
    "gelu(none)": "gelu",
    "lecun_tanh": "tanh(1.7159, 2/3)",
}
_NAMES = {_key(name): name for name in _BY_NAME}
_NAMES |= {_key(name): target for name, target in ALIASES.items()}
_STEP = (
    "a step, whose slope is 0: no gradient passes it, at any depth; tanh(1, 10) is a smooth step, "
    "and hard_tanh has the slope of a straight-through estimator"
)
_JUMPS = "which jumps, so that its slope says nothing of a gradient; relu is continuous"
_NOT_ELEMENTWISE = "which mixes units; an activation is a function of one number"
_EXPONENTIAL = "whose averages E[φ²] = exp(2q) leave a float's range; elu grows no faster than x"
# What people also type, and why there is none, after 'activation is …,'.
_REFUSED = dict.fromkeys(("sign", "step", "heaviside", "binarystep"), _STEP)
_REFUSED |= dict.fromkeys(("hardshrink", "threshold"), _JUMPS)
_REFUSED |= dict.fromkeys(("softmax", "logsoftmax", "softmin", "glu", "maxout"), _NOT_ELEMENTWISE)
_REFUSED["softshrink"] = "which is flat around 0, where theory's averages have no digits"
_REFUSED |= dict.fromkeys(("exponential", "exp"), _EXPONENTIAL)
_REFUSED |= {"rrelu": "whose slope is random; leaky_relu(11/48) has the mean of PyTorch's slopes"}

_BY_FUNCTION: dict[Any, Activation] = {phi.function: phi for phi in _BY_NAME.values()}
_BY_FUNCTION |= {jnp.tanh: tanh, jax.nn.sigmoid: logistic, jax.scipy.special.expit: logistic}
_BY_FUNCTION |= {jax.nn.silu: silu, jax.nn.mish: mish, jax.nn.identity: linear}
_BY_FUNCTION |= {jax.nn.elu: elu, jax.nn.gelu: gelu_tanh, jax.nn.leaky_relu: leaky_relu()}

ALL = (*dict.fromkeys(_BY_NAME.values()), leaky_relu())
