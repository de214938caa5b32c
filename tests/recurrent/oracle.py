"""Recurrent cells in NumPy: dense matrices with zeros in them, one step after the other.

All functions are analytic but for relu, so that a complex step gives their derivatives to the last
digit: `f(w + 1e-20 i v).imag / 1e-20` (Squire and Trapp 1998).
"""

import jax
import numpy as np
from flax import nnx

import bsjax.nnx

STEP = 1e-20


def numbers(model):
    """The state of a model as nested dictionaries of NumPy arrays, block-sparse values as dense
    matrices `values`."""
    found = {}
    for path, layer in nnx.iter_modules(model):
        state = {n: np.asarray(v[...]) for n, v in vars(layer).items() if isinstance(v, nnx.Param)}
        if isinstance(layer, bsjax.nnx.BlockLinear):
            found[path] = {**state, "pattern": layer.pattern.get_value()}
        elif state:
            found[path] = state
    return found


def dense(values, p):
    """Block by block, in plain Python; what a spare slot holds is nowhere."""
    (r, c), (br, bc) = p.grid, p.block
    out = np.zeros(p.shape, values.dtype)
    for block, i, j in zip(values, np.asarray(p.row), np.asarray(p.col), strict=True):
        if i < r and j < c:
            out[i * br : (i + 1) * br, j * bc : (j + 1) * bc] = block
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return x * (x.real > 0)


def layer_norm(x, w):
    """Of one vector per row."""
    if "scale" in w:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["scale"]
    return x + w.get("bias", 0)


def product(h, w, features):
    """`h @ S (+ bias)`, h padded to whole blocks, and the padding of the result left out."""
    s = w["dense"]
    h = np.concatenate([h, np.zeros((len(h), len(s) - h.shape[1]))], axis=1)
    return (h @ s)[:, :features] + w.get("bias", 0)


def step(cell, w, c, h, x):
    """c, h and y after one step of any of the cells; `w` is what `numbers` gave, or near it."""
    m, depth, stride = cell.hidden_features, cell.kind.steps, cell.in_stride

    def at(*path):
        return w.get(path, {})

    def lin(name, h):
        y = product(h, at("steps", name), m)
        return layer_norm(y[:, None], at("step_norms", name))[:, 0] if at("step_norms", 0) else y

    def enters(part, h, how):
        h = h.astype(complex)
        h[..., ::stride] = how(h[..., ::stride], part)
        return h

    maps = (x @ at("inputs")["kernel"]).reshape(len(x), cell.kind.inputs, -1)
    maps = layer_norm(maps, at("input_norm"))
    if cell.kind.small_world:
        h = enters(maps[:, 0], lin(0, h), np.multiply)
        h = lin(1, h) if depth > 1 else h
        h = relu(enters(maps[:, 1], h, np.add))
        for j in range(2, depth):
            h = relu(lin(j, h))
    elif depth:
        h = enters(maps[:, 0], lin(0, h), np.multiply)
    gates = at("gates")
    padded = gates["pattern"].shape[1] // 4
    z = product(h, gates, 4 * padded).reshape(len(h), 4, padded)[..., :m]
    z = layer_norm(z, at("gate_norm"))
    if not cell.kind.small_world:
        z = enters(maps[:, -4:], z, np.add)
    i, f, u, o = z[:, 0], z[:, 1], z[:, 2], z[:, 3]
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
    h = sigmoid(o) * np.tanh(c)
    return c, h, h[:, :: cell.out_stride]


def run(cell, w, carry, xs):
    """The outputs `[n, time, out]` and the last carry, from `xs[n, time, in]`."""
    blocks = {path: a for path, a in w.items() if "pattern" in a}
    w = w | {path: {**a, "dense": dense(a["values"], a["pattern"])} for path, a in blocks.items()}
    (c, h), ys = carry, []
    for t in range(xs.shape[1]):
        c, h, y = step(cell, w, c, h, xs[:, t])
        ys.append(y)
    return np.stack(ys, 1), (c, h)  # complex, if only by their type


def derivative(loss, w, path, name, direction):
    """That of `loss(w)` when one array moves along a direction."""
    moved = {**w, path: {**w[path], name: w[path][name] + 1j * STEP * direction}}
    return loss(moved).imag / STEP


def directions(w, rng):
    """A random direction for each array: path, name and direction."""
    for path, arrays in w.items():
        for name, array in arrays.items():
            if name != "pattern":
                yield path, name, rng.normal(size=array.shape)


def leaf(gradient, path, name):
    """The gradient of one array."""
    for key in (*path, name):
        gradient = gradient[key]
    return np.asarray(jax.tree.leaves(gradient)[0])
