"""Data parallel training that exchanges only the sampled rows of each gradient.

    python -m models.data_parallel --help

Every device has its own batch, and the gradient of a weight is a sum over devices. Where outer
products are sampled, the rows of dw that were not taken are zero. If the sample is drawn by norms
of weights alone, which all devices share, it is the same everywhere: then only the sampled rows are
summed, and nothing needs to be said about which they are (Adelman et al. 2018).

The program trains a student on a random teacher both ways, on virtual devices of a CPU, and counts
the bytes that the compiled programs sum over devices.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from models import _cli as cli
from models._cli import Mistake, option

ABOUT = "Sums sampled rows of gradients over devices, beside whole gradients, and counts bytes."
BYTES = {"f64": 8, "f32": 4, "s32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    devices: int = option(8, "virtual devices of the CPU", least=1)
    batch: int = option(32, "examples per step on each device", least=1)
    width: int = option(256, "features of every layer", least=1)
    layers: int = option(2, "sampled layers", least=1)
    fraction: float = option(0.25, "of the features that is sampled", above=0, most=1)
    block: int = option(8, "neighbouring features that are sampled together", least=1)
    steps: int = option(100, "training steps", least=1)
    learning_rate: float = option(3.0, "of plain gradient descent", above=0)
    seed: int = option(0, "of weights, batches and samples", least=0, most=2**31 - 1)


type Weights = list[jax.Array]  # [k, m] of every layer
type Exchange = Callable[[jax.Array, jax.Array], jax.Array]  # (dw of a device, sampled rows) -> dw


def network(config: Config, weights: Weights, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Sampled layers, by the norms of the rows of their weights. Without keys exact."""
    for i, w in enumerate(weights):
        options = {"fraction": config.fraction, "block": config.block, "scores": norms(w)}
        x = bsjax.sampled_matmul(x, w, key=None if keys is None else keys[i], **options)
        x = x if i == len(weights) - 1 else jnp.tanh(x)
    return x


def norms(w: jax.Array) -> jax.Array:
    """The score of every feature in: the same on all devices, whatever their examples."""
    return jnp.linalg.norm(w, axis=1)


def sampled_rows(config: Config, w: jax.Array, key: jax.Array) -> jax.Array:
    """Which rows of the gradient of `w` are not zero."""
    options = {"fraction": config.fraction, "block": config.block}
    groups, _ = bsjax.sample(norms(w), key=key, **options)
    neighbours = jnp.arange(config.block)
    return (groups[:, None] * config.block + neighbours[None]).reshape(-1)


def exchange_all(dw: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum over devices, of all rows."""
    return jax.lax.psum(dw, "data")


def exchange_sampled(dw: jax.Array, rows: jax.Array) -> jax.Array:
    """The same from the sampled rows: all others are zero on every device."""
    return jnp.zeros(dw.shape, dw.dtype).at[rows].set(jax.lax.psum(dw[rows], "data"))


def gradients(config: Config, mesh: Mesh, exchange: Exchange) -> Callable[..., tuple[Any, Weights]]:
    """`(weights, x, y, keys) -> loss, gradients`, summed over the devices of the mesh."""

    def on_each(weights: Weights, x: jax.Array, y: jax.Array, keys: jax.Array):
        def loss(weights: Weights) -> jax.Array:
            off = network(config, weights, x, keys) - y
            return jnp.mean(jnp.square(off)) / config.devices

        # each device differentiates its own copy: what to sum is decided below
        own = [jax.lax.pcast(w, "data", to="varying") for w in weights]
        value, grads = jax.value_and_grad(loss)(own)
        rows = [sampled_rows(config, w, keys[i]) for i, w in enumerate(weights)]
        return jax.lax.psum(value, "data"), list(map(exchange, grads, rows))

    specs = P(), P("data"), P("data"), P()
    return jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P())


def summed_bytes(program: str) -> int:
    """What each device puts into the sums over devices of a compiled program."""
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    shapes = [shape for one in sums for shape in re.findall(r"(\w+)\[([\d,]*)\]", one)]
    return sum(BYTES[kind] * math.prod(map(int, filter(None, d.split(",")))) for kind, d in shapes)


def train(config: Config, mesh: Mesh, exchange: Exchange) -> tuple[int, list[float], Weights]:
    """Bytes that a step sums over devices, the error before and after, and the trained weights."""
    shape, examples = (config.width, config.width), config.batch * config.devices
    initial, for_teacher, for_steps = jax.random.split(jax.random.key(config.seed), 3)
    normal = jax.nn.initializers.lecun_normal()
    weights = [normal(key, shape) for key in jax.random.split(initial, config.layers)]
    teacher = [normal(key, shape) for key in jax.random.split(for_teacher, config.layers)]
    summed = gradients(config, mesh, exchange)

    @jax.jit
    def step(weights: Weights, x: jax.Array, y: jax.Array, key: jax.Array):
        value, grads = summed(weights, x, y, jax.random.split(key, config.layers))
        return value, [w - config.learning_rate * dw for w, dw in zip(weights, grads, strict=True)]

    def data(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(key, (examples, config.width))
        y = network(config, teacher, x, None)
        return jax.device_put((x, y), NamedSharding(mesh, P("data")))

    weights, for_steps = jax.device_put((weights, for_steps), NamedSharding(mesh, P()))
    program = step.lower(weights, *data(for_steps), for_steps).compile()
    x, y = data(for_steps)  # held out

    def error() -> float:
        """Exactly, relative to an output of zeros."""
        off = network(config, weights, x, None) - y
        return float(jnp.mean(jnp.square(off)) / jnp.mean(jnp.square(y)))

    errors = [error()]
    for key in jax.random.split(for_steps, config.steps):
        _, weights = program(weights, *data(key), key)
    return summed_bytes(program.as_text() or ""), [*errors, error()], weights


def mesh_of(devices: int) -> Mesh:
    """Virtual devices of the CPU, which JAX makes before it first runs."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # it ran already, perhaps with enough of them
        if len(jax.devices("cpu")) < devices:
            raise Mistake(f"--devices {devices}: {len(jax.devices('cpu'))} are there") from None
    found = np.array(jax.devices("cpu")[:devices])
    return Mesh(found, ("data",), axis_types=(AxisType.Auto,))


def main(argv: list[str] | None = None) -> int:
    """Trains both ways and says what each exchanged; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.data_parallel", about=ABOUT)
    cli.check_multiple("width", config.width, "--block", config.block)
    mesh = mesh_of(config.devices)
    print(f"{config.layers} layers {config.width} x {config.width} on {config.devices} devices")
    runs = {"all rows": exchange_all, f"fraction {config.fraction}": exchange_sampled}
    results = {name: train(config, mesh, exchange) for name, exchange in runs.items()}
    print(f"{'exchanged':<16}{'bytes a step':>14}{'error before':>14}{'after':>8}")
    for name, (count, (before, after), _) in results.items():
        print(f"{name:<16}{count:>14,}{before:>14.3f}{after:>8.3f}")
    (whole, _, exact), (part, _, sampled) = results.values()
    off = max(float(abs(a - b).max()) for a, b in zip(exact, sampled, strict=True))
    print(f"{part / max(1, whole):.3f} of the bytes; the weights differ by {off:.1e} at most")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
