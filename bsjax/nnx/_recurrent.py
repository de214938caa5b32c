"""Block-sparse recurrent cells for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from bsjax import _recurrent, _small_world, inits
from bsjax.nnx._linear import BlockLinear
from bsjax.ops import Implementation

LECUN = jax.nn.initializers.lecun_normal()
ZEROS = jax.nn.initializers.zeros


class _Norm(nnx.Module):
    """Layer norm of several vectors of features, or only a bias, or nothing."""

    def __init__(
        self, shape: tuple[int, int], scaled: bool, bias_init: Any, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.scale: nnx.Param[Array] | None
        self.bias: nnx.Param[Array] | None
        self.scale = nnx.Param(jnp.ones(shape, dtype)) if scaled else nnx.data(None)
        if bias_init is None:
            self.bias = nnx.data(None)
        else:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, dtype))

    def __call__(self, x: Array) -> Array:
        scale, bias = (None if a is None else a[...] for a in (self.scale, self.bias))
        return _recurrent.normalize(x, scale, bias)


class _Cell(nnx.RNNCellBase):
    """What the cells share. Submodules are `inputs` and `input_norm`, the lists `steps` and
    `step_norms`, `gates` and `gate_norm`, and `dropout`."""

    kind: _recurrent.Kind

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        pattern: Any,
        block: int | tuple[int, int] | None = None,
        in_stride: int = 1,
        out_stride: int = 1,
        use_layer_norm: bool = False,
        forget_bias: float = 1.0,
        dropout_rate: float = 0.0,
        gate_fn: Any = jax.nn.sigmoid,
        activation_fn: Any = jnp.tanh,
        kernel_init: Any = LECUN,
        recurrent_kernel_init: inits.Initializer = inits.orthogonal(),  # noqa: B008 - a pure function
        bias_init: Any = ZEROS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        kind, m = self.kind, hidden_features
        _recurrent.check_cell(
            kind,
            dropout_rate,
            in_features=in_features,
            hidden_features=m,
            in_stride=in_stride,
            out_stride=out_stride,
        )
        self.in_features, self.hidden_features = in_features, m
        self.in_stride, self.out_stride = in_stride, out_stride
        self.gate_fn, self.activation_fn = gate_fn, activation_fn
        self.dtype, self.param_dtype = dtype, param_dtype
        *steps, last = _recurrent.step_patterns(kind, pattern, block, m)
        gates, gates_init = _recurrent.side_by_side(last, m, recurrent_kernel_init)
        common: Any = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
        common |= {"rngs": rngs}

        def product(p: Any, features: int, use_bias: bool, init: Any) -> BlockLinear:
            return BlockLinear(
                m,
                features,
                pattern=p,
                use_bias=use_bias,
                kernel_init=init,
                bias_init=bias_init,
                implementation=implementation,
                **common,
            )

        def norm(shape: tuple[int, int], init: Any) -> _Norm:
            return _Norm(shape, use_layer_norm, init, param_dtype, rngs)

        count, width = kind.projected(m, in_stride)
        self.inputs = nnx.Linear(
            in_features, count * width, use_bias=False, kernel_init=kernel_init, **common
        )
        biased = kind.small_world or use_layer_norm
        self.input_norm = norm((count, width), bias_init if biased else None)
        biased = kind.small_world and not use_layer_norm
        steps = [product(p, m, biased, recurrent_kernel_init) for p in steps]
        self.steps: nnx.List[Any] = nnx.List(steps)
        self.step_norms: nnx.List[Any] = nnx.List(
            [norm((1, m), bias_init) for _ in steps if use_layer_norm]
        )
        self.gates = product(gates, gates.shape[1], False, gates_init)
        gate_bias = _recurrent.gate_bias(bias_init, forget_bias)
        self.gate_norm = norm((_recurrent.GATES, m), gate_bias)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    @property
    def out_features(self) -> int:
        """Of the output: every `out_stride`-th of the state."""
        return -(-self.hidden_features // self.out_stride)

    @property
    def num_feature_axes(self) -> int:
        return 1

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> _recurrent.Carry:
        """c and h of shape `(*input_shape[:-1], hidden_features)`: zeros, which take no random
        numbers, or what `carry_init` gives. c is of `param_dtype`, h of `dtype` or the same."""
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.carry
        if carry_init is not None and rngs is None:
            raise ValueError(
                f"{self.kind.cell}: `carry_init` needs random numbers: give `rngs=nnx.Rngs(0)`."
            )
        keys = (None, None) if carry_init is None else (rngs(), rngs())
        return _recurrent.initial_carry(self, input_shape, carry_init or ZEROS, keys)

    def project(self, inputs: Any) -> Array:
        """What a step needs of its input, for any number of steps at once."""
        return _recurrent.project(self, inputs)

    def step(self, carry: Any, projected: Array) -> tuple[_recurrent.Carry, Array]:
        """A step with what `project` gave."""
        return _recurrent.step(self, carry, projected)

    def __call__(self, carry: Any, inputs: Any) -> tuple[_recurrent.Carry, Array]:
        """The carry and the output `[..., out_features]` after a step with `inputs[...,
        in_features]`."""
        return self.step(carry, self.project(inputs))


class BlockLSTMCell(_Cell):
    """An LSTM whose recurrent matrices are block-sparse, with one pattern for the four gates.

    With `i, f, u, o = x W + h S + b`, all four next to each other:
    `c = sigmoid(f) * c + sigmoid(i) * tanh(u)`, `h = sigmoid(o) * tanh(c)` (Hochreiter and
    Schmidhuber 1997, with the forget gate of Gers et al. 2000). With `use_layer_norm` it is
    `norm(x W) + norm(h S)`, each gate by itself (Ba, Kiros and Hinton 2016).

    The arguments, the carry `(c, h)` and the call are those of `nnx.LSTMCell`. Its own are:

    * `pattern`: a `BlockPattern` of a square matrix, or a bool mask with `block=`;
    * `in_stride`, `out_stride`: the input enters at every `in_stride`-th feature of the state, and
      the output `y[..., out_features]` is every `out_stride`-th of h (the sparse projections of
      Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights"): the input maps, and
      what reads y, are smaller by as much;
    * `forget_bias`: added to the initial bias of the forget gate;
    * `dropout_rate`: of the update tanh(u), a key per step from the stream "dropout" of `rngs`;
      `eval()` switches it off, as that of `nnx.Dropout`;
    * `precision`, `implementation`: those of `bsjax.matmul`.
    """

    kind = _recurrent.LSTM


class BlockMultiplicativeLSTMCell(_Cell):
    """A multiplicative LSTM whose recurrent matrices are block-sparse.

    `(x W_m) * (h S_m)` takes the place of h in the gates of `BlockLSTMCell`, whose arguments it
    has. `pattern` is one for all products, or a list of two, that of S_m and that of the gates.
    Krause, Lu, Murray and Renals 2016, "Multiplicative LSTM for sequence modelling".
    """

    kind = _recurrent.MULTIPLICATIVE


class SmallWorldLSTMCell(_Cell):
    """A wide LSTM with block-sparse matrices that mixes its state over a few internal steps.

    With `m = norm(x W_m)`, `a = norm(x W_a)` and `lin_j(h) = norm(h S_j)`, for D = `depth`::

        h = lin_0(h) * m
        h = relu(lin_1(h) + a)
        h = relu(lin_j(h))                               j = 2 .. D - 1
        i, f, u, o = lin_i(h), lin_f(h), lin_u(h), lin_o(h)
        c = sigmoid(f) * c + sigmoid(i) * tanh(u)
        h = sigmoid(o) * tanh(c)

    With `depth=1` the one internal step is `relu(lin_0(h) * m + a)`. Every norm has a gain and a
    bias of its own; with `use_layer_norm=False` it adds a bias only, inside the kernel where one
    runs. Matrices begin as the identity. The recurrent ones have `(D + 4) density m^2` parameters.

    `pattern` is one for all products, or a list of D + 1: one for each internal step, and that of
    the gates. Each is a `BlockPattern` or a bool mask with `block=`; the blocks of the diagonal are
    added to a mask, and a `BlockPattern` must have them. `from_graph` draws the patterns of a given
    state, `from_budget` those of the widest state that so many parameters allow.
    `bsjax.patterns.mixing_profile` says after how many steps all blocks are connected. The other
    arguments are those of `BlockLSTMCell`.

    Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights", algorithm 1.
    """

    kind = _recurrent.SMALL_WORLD

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        pattern: Any,
        block: int | tuple[int, int] | None = None,
        depth: int = 5,
        use_layer_norm: bool = True,
        recurrent_kernel_init: inits.Initializer = inits.identity(),  # noqa: B008 - a pure function
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        self.kind = self.kind.with_depth(depth)
        super().__init__(
            in_features,
            hidden_features,
            pattern=pattern,
            block=block,
            use_layer_norm=use_layer_norm,
            recurrent_kernel_init=recurrent_kernel_init,
            rngs=rngs,
            **options,
        )

    @property
    def depth(self) -> int:
        """The number of internal steps."""
        return self.kind.steps

    @classmethod
    def from_graph(
        cls,
        in_features: int,
        hidden_features: int,
        *,
        block: int,
        depth: int = 5,
        graph: Any = "barabasi_albert",
        parameters: Any = None,
        share_pattern: bool = False,
        seed: int = 0,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "SmallWorldLSTMCell":
        """With patterns that `bsjax.patterns.step_masks` draws: another one for each internal step
        and for the gates, or one for all with `share_pattern`. `graph` is the name of a family,
        "barabasi_albert" with `parameters={"m": 4}` unless given, "watts_strogatz", "balanced",
        "random" or "strides", or a function `graph(n, seed=..., **parameters) -> mask`."""
        masks = _small_world.graph_masks(
            hidden_features,
            block=block,
            depth=depth,
            graph=graph,
            parameters=parameters,
            share_pattern=share_pattern,
            seed=seed,
        )
        return cls(
            in_features,
            hidden_features,
            pattern=masks,
            block=block,
            depth=depth,
            rngs=rngs,
            **options,
        )

    @classmethod
    def from_budget(
        cls,
        in_features: int,
        budget: int,
        *,
        block: int,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "SmallWorldLSTMCell":
        """With the most blocks of state that `budget` parameters allow, input maps and norms
        counted; the other arguments are those of `from_graph`. The graph must not have fewer edges
        for more nodes."""
        m = _small_world.hidden_within(budget, in_features, block=block, **options)
        return cls.from_graph(in_features, m, block=block, rngs=rngs, **options)
