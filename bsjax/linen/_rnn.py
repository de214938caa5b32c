"""`RNN` for Flax Linen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.core.scope import group_collections, in_filter

from bsjax import _sequence


class RNN(nn.RNN):
    """`nn.RNN`, where weights get their gradient once, after all steps.

    Takes any cell of Flax and the fields of `nn.RNN`, whose defaults here fit block-sparse cells:
    `variable_broadcast` has the collections `params` and `patterns`, and `split_rngs` gives each
    step another key of the stream "dropout" (not those that `nn.RNN` would give). Gradients, the
    cell's `project`, `remat` and `seq_lengths` are as in `bsjax.nnx.RNN`.

    With `variable_axes`, variables that have an axis for steps, the loop is that of `nn.RNN`, and
    so are the gradients.
    """

    variable_broadcast: Any = ("params", "patterns")
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False, "dropout": True})
    remat: bool = False

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        init_key: Any = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """The outputs of all steps, or `(carry, outputs)`; `inputs[batch..., time, features...]`,
        or time first."""
        inputs = jnp.asarray(inputs)
        if self.variable_axes:
            if self.remat:
                raise ValueError(
                    "RNN: `remat` does not go with `variable_axes`: leave one of them out."
                )
            return super().__call__(
                inputs,
                initial_carry=initial_carry,
                init_key=init_key,
                seq_lengths=seq_lengths,
                return_carry=return_carry,
                time_major=time_major,
                reverse=reverse,
                keep_order=keep_order,
            )
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        features = self.cell.num_feature_axes
        time_axis = 0 if time_major else inputs.ndim - features - 1
        if initial_carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            shape = (*inputs.shape[:time_axis], *inputs.shape[time_axis + 1 :])
            initial_carry = self.cell.initialize_carry(key, shape)
        if self.is_initializing():  # this makes the variables
            first = jax.lax.index_in_dim(inputs, 0, time_axis, keepdims=False)
            self.cell(initial_carry, first)
        cell, variables = self.cell.unbind()
        filters = (self.variable_carry, self.variable_broadcast)
        carried, shared = group_collections(variables, filters)
        streams = [] if self.scope is None else list(self.scope.rngs)
        keys = {name: self.make_rng(name) for name in streams if self._splits(name) is not None}
        hoisted = hasattr(cell, "project") and hasattr(cell, "step")

        def step(state: tuple[Any, Any], x: tuple[Any, Any]) -> Any:
            (carry, carried), (inputs, time) = state, x
            rngs = {
                n: jax.random.fold_in(k, time) if self._splits(n) else k for n, k in keys.items()
            }
            (carry, y), carried = cell.apply(
                {**shared, **carried},
                carry,
                inputs,
                rngs=rngs,
                mutable=list(carried),
                method="step" if hoisted else None,
            )
            return (carry, carried), (y, None)

        def project(xs: jax.Array) -> Any:
            return cell.apply({**shared, **carried}, xs, method="project")

        (carry, carried), (ys, _) = _sequence.run(
            step,
            (initial_carry, carried),
            inputs,
            jnp.arange(inputs.shape[time_axis]),
            project=project if hoisted else None,
            time_axis=time_axis,
            feature_axes=features,
            seq_lengths=seq_lengths,
            select=return_carry,
            reverse=self.reverse if reverse is None else reverse,
            keep_order=self.keep_order if keep_order is None else keep_order,
            unroll=self.unroll,
            remat=self.remat,
        )
        for collection, values in carried.items():
            for name, value in values.items():
                self.cell.put_variable(collection, name, value)
        return (carry, ys) if return_carry else ys

    def _splits(self, stream: str) -> bool | None:
        """Whether each step has a key of its own; None if steps have none of this stream."""
        return next((own for name, own in self.split_rngs.items() if in_filter(name, stream)), None)
