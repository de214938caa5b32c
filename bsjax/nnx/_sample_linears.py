"""`sample_linears`: the linear layers of a model that exists, sampled."""

import inspect
from typing import Any

import jax
from flax import nnx

from bsjax import _layers
from bsjax.nnx._sampled import SampledLinear, stream
from bsjax.ops import Implementation, Policy, Sampler

OP = "sample_linears"
DEFAULTS = inspect.signature(nnx.Linear.__init__).parameters
# What an `nnx.Linear` can do and a `SampledLinear` cannot.
UNKEPT = ("dot_general", "promote_dtype", "preferred_element_type")

type Path = tuple[Any, ...]


def sample_linears(
    model: Any,
    *,
    filter: Any = None,
    fraction: float | int,
    sampler: Sampler = "systematic",
    block: int = 1,
    policy: Policy = "forward",
    implementation: Implementation = "auto",
    deterministic: bool | None = False,
    rng_collection: str = "sampling",
    rngs: Any,
) -> dict[Path, SampledLinear]:
    """Turn the `nnx.Linear`s of a model into `SampledLinear`s, in place, and return them by path.

    Each stays the object that it was, wherever the model holds it, and so do its Params: ties, and
    the state of an optimizer, stay valid. Its class and what it does when called change. A layer in
    several places is turned once.

    `filter` says which: a filter of NNX, most generally a function `(path, layer) -> bool`, such as
    `lambda path, layer: path[-1] != "head"`; None is all. A path is that of `nnx.iter_graph`, the
    first one of a layer in several places. Subclasses of `nnx.Linear` are left alone, and so are
    other layers that multiply (`nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv`).

    `rngs` (`nnx.Rngs` or `nnx.RngStream`) has the stream `rng_collection`, or `default`, of which
    each layer gets a fork. Layers that `nnx.vmap` has stacked, along leading axes, get a key each:
    scan or map over their `nnx.RngState` as over their `nnx.Param`. The other arguments are those
    of `SampledLinear`.

    A `ValueError` if no layer passes, or if one that passes cannot be sampled: its features are not
    multiples of `block`, or it has a `dot_general`, `promote_dtype`, `preferred_element_type` or
    `precision` that sampled products do not have. Then nothing is changed.
    """
    options = {
        "fraction": fraction,
        "sampler": sampler,
        "block": block,
        "policy": policy,
        "implementation": implementation,
    }
    _layers.check_sampling(OP, None, **options)
    found = stream(OP, rngs, rng_collection)
    if found is None:
        raise ValueError(
            f'{OP}: `rngs` has no stream "{rng_collection}" and no "default": give one, for '
            f"example rngs=nnx.Rngs({rng_collection}=0)."
        )
    passes = nnx.filterlib.to_predicate(True if filter is None else filter)
    dense = {path: one for path, one in nnx.iter_graph(model) if type(one) is nnx.Linear}
    linears = {path: one for path, one in dense.items() if passes(path, one)}
    if not linears:
        has = ", ".join(map(str, list(dense)[:3])) + ", ..." * (len(dense) > 3)
        raise ValueError(
            f"{OP}: no nnx.Linear passes `filter`, which is given a path and the layer; `model` "
            f"has {has or 'none'} (other classes do not count, nor do subclasses)."
        )
    for path, linear in linears.items():
        if reason := _why_not(linear, options):
            raise ValueError(
                f"{OP}: the layer at {path} cannot be sampled: {reason} Or leave it out, with "
                f"filter=lambda path, layer: path != {path}."
            )
    options |= {"deterministic": deterministic, "rng_collection": rng_collection}
    return {path: _turned(linear, options, found) for path, linear in linears.items()}


def _why_not(linear: nnx.Linear, options: dict[str, Any]) -> str | None:
    """The reason why a layer cannot be sampled, or None if it can."""
    shape = (linear.in_features, linear.out_features)
    if linear.kernel.shape[-2:] != shape:
        return (
            f"its kernel has shape {linear.kernel.shape}, expected (..., {shape[0]}, {shape[1]}): "
            "stack layers along leading axes."
        )
    for name in UNKEPT:
        if getattr(linear, name) is not DEFAULTS[name].default:
            return f"it has a `{name}` of its own, which sampled products do not have."
    if linear.precision not in (None, "highest", jax.lax.Precision.HIGHEST):
        return f"its precision is {linear.precision!r}, and sampled products are in full float32."
    return _layers.why_not_sampled(shape, **options)


def _turned(linear: Any, options: dict[str, Any], source: nnx.RngStream) -> SampledLinear:
    """The same object, of the other class."""
    for name in ("precision", *UNKEPT):
        delattr(linear, name)
    object.__setattr__(linear, "__class__", SampledLinear)
    for name, value in options.items():
        setattr(linear, name, value)
    stacked = linear.kernel.shape[:-2]
    if stacked:
        linear.rngs = nnx.RngStream(jax.random.split(source(), stacked), tag=source.tag)
    else:
        linear.rngs = source.fork()
    return linear
