"""`RNN` for Flax NNX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bsjax import _sequence
from bsjax.nnx._linear import Pattern


class RNN(nnx.RNN):
    """`nnx.RNN`, where weights get their gradient once, after all steps.

    Takes any cell of Flax and the arguments of `nnx.RNN`, and gives the same results. It differs in
    the gradient of weights that all steps use: of every block-sparse product it is one `sddmm` over
    the tokens of all steps (`bsjax.scan`), and what a cell computes from its input alone (its
    method `project`, if it has one beside `step`) is computed for all steps at once. `remat=True`
    keeps the carry of each step for the backward pass and computes the rest of it again.

    Of the state of the cell, Params and patterns are the same in all steps, and everything else,
    such as that of random numbers, goes from step to step. `state_axes` says otherwise, as for
    `nnx.RNN`; a Param that is carried has its gradient summed step by step.

    With `seq_lengths` and `return_carry`, the carry is that after the last step of each sequence;
    unlike that of `nnx.RNN` it is selected in the loop, and no step's is kept for it. After no step
    at all it is the first one.
    """

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[Any, Any] | None = None,
        broadcast_rngs: Any = None,
        remat: bool = False,
        rngs: Any = True,
    ) -> None:
        if state_axes is None:
            state_axes = nnx.StateAxes({(nnx.Param, Pattern): None, ...: nnx.Carry})
        super().__init__(
            cell,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
            unroll=unroll,
            state_axes=state_axes,
            broadcast_rngs=broadcast_rngs,
            rngs=rngs,
        )
        self.remat = remat

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """The outputs of all steps, or `(carry, outputs)`; `inputs[batch..., time, features...]`,
        or time first."""
        inputs = jnp.asarray(inputs)
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        features = self.cell.num_feature_axes
        time_axis = 0 if time_major else inputs.ndim - features - 1
        if initial_carry is None:
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            shape = (*inputs.shape[:time_axis], *inputs.shape[time_axis + 1 :])
            initial_carry = self.cell.initialize_carry(shape, rngs)
        broadcast = nnx.All(nnx.RngState, self.broadcast_rngs)
        axes = {broadcast: None, **self.state_axes}

        # as `nnx.RNN` does: random numbers that are the same in all steps differ from call to call
        @nnx.split_rngs(splits=1, only=self.broadcast_rngs, squeeze=True)
        def run(cell: Any) -> tuple[Any, Any]:
            loop = _Loop(cell, axes)
            (carry, carried), (ys, sliced) = _sequence.run(
                loop.step,
                (initial_carry, loop.carried),
                inputs,
                loop.sliced,
                project=cell.project if loop.hoisted else None,
                time_axis=time_axis,
                feature_axes=features,
                seq_lengths=seq_lengths,
                select=return_carry,
                reverse=self.reverse if reverse is None else reverse,
                keep_order=self.keep_order if keep_order is None else keep_order,
                unroll=self.unroll,
                remat=self.remat,
            )
            loop.update(cell, carried, sliced)
            return carry, ys

        carry, ys = run(self.cell)
        return (carry, ys) if return_carry else ys


class _Loop:
    """A cell as a function of its state: what all steps share, what goes from each to the next, and
    what has an axis for steps."""

    def __init__(self, cell: Any, axes: Mapping[Any, Any]) -> None:
        self.hoisted = hasattr(cell, "project") and hasattr(cell, "step")
        self.filters, self.axes = list(axes), list(axes.values())
        self.graphdef, self.shared, self.carried, sliced = self._split(cell)
        self.sliced = [
            _moved(state, axis, 0) for state, axis in zip(sliced, self._own(), strict=True)
        ]

    def step(self, state: tuple[Any, Any], x: tuple[Any, Any]) -> Any:
        """`(carry, carried), (x, sliced)` to the same after a step, and `(y, sliced)`."""
        (carry, carried), (inputs, sliced) = state, x
        shared = jax.tree.map(lambda a: a, self.shared)  # variables of this trace
        states = {None: iter(shared), nnx.Carry: iter(carried)}
        rest = iter(sliced)
        cell = nnx.merge(self.graphdef, *(next(states.get(axis, rest)) for axis in self.axes))
        carry, y = (cell.step if self.hoisted else cell)(carry, inputs)
        graphdef, after, carried, sliced = self._split(cell)
        leaves = zip(jax.tree.leaves(after), jax.tree.leaves(self.shared), strict=True)
        if graphdef != self.graphdef or any(new is not old for new, old in leaves):
            raise ValueError(
                "RNN: a step changed a Param or another variable that all steps share, or added "
                "one: give `state_axes=nnx.StateAxes({...: nnx.Carry})` to carry all of them from "
                "step to step, and make every variable when the cell is made."
            )
        return (carry, carried), (y, sliced)

    def update(self, cell: Any, carried: Any, sliced: Any) -> None:
        """Leaves the cell with the state after the last step."""
        moved = [_moved(state, 0, axis) for state, axis in zip(sliced, self._own(), strict=True)]
        for state in (*carried, *moved):
            nnx.update(cell, state)

    def _own(self) -> list[int]:
        return [axis for axis in self.axes if isinstance(axis, int)]

    def _split(self, cell: Any) -> tuple[Any, list[Any], list[Any], list[Any]]:
        graphdef, *states = nnx.split(cell, *self.filters)
        pairs = list(zip(states, self.axes, strict=True))
        shared = [state for state, axis in pairs if axis is None]
        carried = [state for state, axis in pairs if axis is nnx.Carry]
        return graphdef, shared, carried, [state for state, axis in pairs if isinstance(axis, int)]


def _moved(state: Any, source: int, target: int) -> Any:
    return jax.tree.map(lambda a: jnp.moveaxis(a, source, target), state)
