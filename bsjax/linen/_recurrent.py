"""Block-sparse recurrent cells for Flax Linen."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from bsjax import _recurrent, _small_world, inits
from bsjax.linen._linear import BlockLinear
from bsjax.linen._pattern import FieldPattern
from bsjax.ops import Implementation


class _Norm(nn.Module):
    """Layer norm of several vectors of features, or only a bias, or nothing."""

    shape: tuple[int, int]
    scaled: bool
    bias_init: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = bias = None
        if self.scaled:
            scale = self.param("scale", nn.initializers.ones, self.shape, self.param_dtype)
        if self.bias_init is not None:
            bias = self.param("bias", self.bias_init, self.shape, self.param_dtype)
        return _recurrent.normalize(x, scale, bias)


class _Cell(nn.RNNCellBase):
    """What the cells share: the submodules of those in `bsjax.nnx`, under the same names."""

    KIND: ClassVar[_recurrent.Kind]

    hidden_features: int
    _: dataclasses.KW_ONLY
    pattern: Any
    block: int | tuple[int, int] | None = None
    in_stride: int = 1
    out_stride: int = 1
    use_layer_norm: bool = False
    forget_bias: float = 1.0
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    gate_fn: Any = jax.nn.sigmoid
    activation_fn: Any = jnp.tanh
    kernel_init: Any = jax.nn.initializers.lecun_normal()
    recurrent_kernel_init: inits.Initializer = inits.orthogonal()
    bias_init: Any = jax.nn.initializers.zeros
    carry_init: Any = jax.nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("hidden_features", "in_stride", "out_stride")}
        _recurrent.check_cell(self.kind, self.dropout_rate, **sizes)
        ps = _recurrent.step_patterns(self.kind, self.pattern, self.block, self.hidden_features)
        fields = tuple(FieldPattern.of(self.kind.cell, p, None) for p in ps)
        object.__setattr__(self, "pattern", fields)
        super().__post_init__()

    @property
    def kind(self) -> _recurrent.Kind:
        return self.KIND

    def setup(self) -> None:
        m, kind, (*steps, last) = self.hidden_features, self.kind, self.pattern
        gates, gates_init = _recurrent.side_by_side(last, m, self.recurrent_kernel_init)
        common: Any = {n: getattr(self, n) for n in ("dtype", "param_dtype", "precision")}

        def product(features: int, p: Any, use_bias: bool, init: Any) -> BlockLinear:
            return BlockLinear(
                features,
                pattern=p,
                use_bias=use_bias,
                kernel_init=init,
                bias_init=self.bias_init,
                implementation=self.implementation,
                **common,
            )

        def norm(shape: tuple[int, int], init: Any) -> _Norm:
            return _Norm(shape, self.use_layer_norm, init, self.param_dtype)

        count, width = kind.projected(m, self.in_stride)
        self.inputs = nn.Dense(
            count * width, use_bias=False, kernel_init=self.kernel_init, **common
        )
        biased = kind.small_world or self.use_layer_norm
        self.input_norm = norm((count, width), self.bias_init if biased else None)
        biased = kind.small_world and not self.use_layer_norm
        self.steps = [product(m, p, biased, self.recurrent_kernel_init) for p in steps]
        self.step_norms = [norm((1, m), self.bias_init) for _ in steps if self.use_layer_norm]
        self.gates = product(gates.shape[1], gates, False, gates_init)
        gate_bias = _recurrent.gate_bias(self.bias_init, self.forget_bias)
        self.gate_norm = norm((_recurrent.GATES, m), gate_bias)
        self.dropout = nn.Dropout(self.dropout_rate, deterministic=self._exact())

    @property
    def out_features(self) -> int:
        """Of the output: every `out_stride`-th of the state."""
        return -(-self.hidden_features // self.out_stride)

    @property
    def num_feature_axes(self) -> int:
        return 1

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> _recurrent.Carry:
        """c and h of shape `(*input_shape[:-1], hidden_features)`, by `carry_init`."""
        return _recurrent.initial_carry(
            self, input_shape, self.carry_init, list(jax.random.split(rng))
        )

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

    def _exact(self) -> bool:
        exact = self.deterministic
        return not self.has_rng("dropout") if exact is None else exact


class BlockLSTMCell(_Cell):
    """An LSTM whose recurrent matrices are block-sparse.

    The fields of `bsjax.nnx.BlockLSTMCell` without `in_features` and `rngs`, and `carry_init` as in
    `nn.LSTMCell`. `deterministic` switches dropout off; where it is None, a stream "dropout" in the
    `rngs` of `apply` switches it on. Flax's own `nn.RNN` needs
    `variable_broadcast=("params", "patterns")`, and for dropout
    `split_rngs={"params": False, "dropout": True}`, which `bsjax.linen.RNN` has by default.
    """

    KIND = _recurrent.LSTM


class BlockMultiplicativeLSTMCell(_Cell):
    """A multiplicative LSTM whose recurrent matrices are block-sparse.

    The fields of `BlockLSTMCell`; equations in `bsjax.nnx.BlockMultiplicativeLSTMCell`.
    """

    KIND = _recurrent.MULTIPLICATIVE


class SmallWorldLSTMCell(_Cell):
    """A wide LSTM with block-sparse matrices that mixes its state over a few internal steps.

    The fields of `BlockLSTMCell`, and `depth`; equations in `bsjax.nnx.SmallWorldLSTMCell`.
    """

    KIND = _recurrent.SMALL_WORLD

    depth: int = 5
    use_layer_norm: bool = True
    recurrent_kernel_init: inits.Initializer = inits.identity()

    @property
    def kind(self) -> _recurrent.Kind:
        return self.KIND.with_depth(self.depth)

    @classmethod
    def from_graph(
        cls,
        hidden_features: int,
        *,
        block: int,
        depth: int = 5,
        graph: Any = "barabasi_albert",
        parameters: Any = None,
        share_pattern: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> "SmallWorldLSTMCell":
        """With drawn patterns, as `bsjax.nnx.SmallWorldLSTMCell.from_graph` says."""
        masks = _small_world.graph_masks(
            hidden_features,
            block=block,
            depth=depth,
            graph=graph,
            parameters=parameters,
            share_pattern=share_pattern,
            seed=seed,
        )
        return cls(hidden_features, pattern=masks, block=block, depth=depth, **options)

    @classmethod
    def from_budget(
        cls,
        in_features: int,
        budget: int,
        *,
        block: int,
        **options: Any,
    ) -> "SmallWorldLSTMCell":
        """With the most blocks of state that `budget` parameters allow, for inputs of so many
        features, as `bsjax.nnx.SmallWorldLSTMCell.from_budget` says."""
        m = _small_world.hidden_within(budget, in_features, block=block, **options)
        return cls.from_graph(m, block=block, **options)
