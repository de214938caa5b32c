"""What the Transformer modules of both Flax dialects share besides attention itself."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from bsjax import inits
from bsjax._layers import as_pattern
from bsjax.ops._activations import named
from bsjax.pattern import BlockPattern

PROJECTIONS = ("query", "key", "value", "out")
NORMS = ("rms", "layer")
LECUN = jax.nn.initializers.lecun_normal()
STORED = inits.stored_fan_in()


def projections(layer: str, pattern: Any, block: Any) -> dict[str, BlockPattern]:
    """The pattern of each projection that has one, from one for all or a mapping of names."""
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping):
        pattern = dict.fromkeys(PROJECTIONS, pattern)
    if unknown := sorted(set(pattern) - set(PROJECTIONS)):
        raise ValueError(
            f"{layer}: `projection_pattern` names {unknown}, but the projections are "
            f"{list(PROJECTIONS)}."
        )
    return {
        name: as_pattern(layer, one, None if isinstance(one, BlockPattern) else block)
        for name, one in pattern.items()
        if one is not None
    }


# layers that are made of one function are equal, and compile once
@functools.cache
def kernel_init(init: Any, gain: float, sparse: bool) -> Any:
    """An initialiser for dense or block-sparse weights, `gain` times as large."""
    init = (STORED if sparse else LECUN) if init is None else init
    if gain == 1:
        return init

    @inits.by_pattern
    def stored(key: Any, p: BlockPattern, dtype: Any, features: Any) -> Array:
        return inits.initialize(init, key, p, dtype, features) * gain

    def dense(key: Any, shape: Any, dtype: Any) -> Array:
        return init(key, shape, dtype) * gain

    return stored if sparse else dense


def mlp(x: Any, up: Any, gate: Any, down: Any, activation: Any) -> Array:
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`."""
    act = named("BlockTransformerLayer", activation)
    assert act is not None
    return down(act(up(x)) if gate is None else act(gate(x)) * up(x))


def check_layer(layer: str, *, norm: str, attention: Any, mlp: Any) -> None:
    """The arguments that belong together."""
    if norm not in NORMS:
        raise ValueError(f'{layer}: `norm` must be "rms" or "layer", got {norm!r}.')
    if mlp is not None and "hidden_features" not in mlp:
        raise ValueError(
            f"{layer}: `mlp` must say `hidden_features`, got {sorted(mlp)}: for example "
            'mlp={"hidden_features": 2048}.'
        )
    if mlp is None and not (attention or {}).get("persistent"):
        raise ValueError(
            f"{layer}: there is neither an `mlp` nor persistent memory in its place: give "
            'mlp={"hidden_features": ...}, or attention={"persistent": ...}.'
        )


def mlp_options(options: Mapping[str, Any], gain: float) -> tuple[bool, dict[str, Any]]:
    """Whether it is block-sparse, and its options: those of a `BlockMLP`, or of a `DenseMLP`."""
    options = dict(options)
    if options.get("pattern") is None:
        for name in ("pattern", "down_pattern", "block", "implementation"):
            options.pop(name, None)
        return False, options | {"down_gain": gain}
    init = options.pop("kernel_init", None)
    down = options.pop("down_kernel_init", None) or init
    more = {"kernel_init": kernel_init(init, 1.0, True)}
    return True, options | more | {"down_kernel_init": kernel_init(down, gain, True)}


def check_encoded(layer: str, encoded: Any, cross: Any) -> None:
    """What an encoder gives is there where it is attended to, and nowhere else."""
    if (encoded is None) == (cross is None):
        return
    if encoded is None:
        raise ValueError(
            f"{layer}: it attends to what an encoder gives, which is missing: call it with "
            "`encoded`, of shape (..., positions, features)."
        )
    raise ValueError(
        f"{layer}: `encoded` is given, but the layer does not attend to it: make it with "
        "cross_attention={}."
    )
