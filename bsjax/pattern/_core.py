"""`BlockPattern`: the coordinates of the stored blocks of a sparse matrix."""

import json
from typing import Any, NoReturn, SupportsIndex

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from bsjax.pattern import _validate as validate
from bsjax.pattern._index import as_leaf, is_concrete, namespace, stable_argsort

type Size = SupportsIndex  # any whole number
type Pair = Size | tuple[Size, Size]


@jax.tree_util.register_pytree_with_keys_class
class BlockPattern:
    """Which blocks of a `(r * br, c * bc)` matrix are stored.

    Slot `i` holds block-row `row[i]` and block-column `col[i]`; slots are ordered by block-column,
    then by block-row. The values live elsewhere, as an ordinary array `values[e, br, bc]` in the
    same order. A spare slot has `row == r` and `col == c`, sorts last, and is never read.

    A pattern is a pytree. The coordinates are leaves and the sizes are static: moving a block
    recompiles nothing, changing the capacity does. Leading axes on the leaves (`[h, e]`) are
    several patterns of equal capacity, for `jax.vmap`, `jax.lax.scan` and sharding.

    Static sizes are not leaves: a checkpoint that only saves leaves loses them. Save `grid` and
    `block` beside the leaves and compare them on restore.

    Build one with `from_mask` or `from_coords`, which check what they are given. The constructor
    itself checks nothing.
    """

    row: Int32[Array, "*h e"]
    col: Int32[Array, "*h e"]
    grid: tuple[int, int]
    block: tuple[int, int]
    __slots__ = ("__weakref__", "block", "col", "grid", "row")

    def __init__(self, row: Any, col: Any, grid: tuple[int, int], block: tuple[int, int]) -> None:
        # JAX unflattens with placeholders (None, object(), tracers): nothing may be checked here
        for name, value in (("row", row), ("col", col), ("grid", grid), ("block", block)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"BlockPattern is immutable: build a new one instead of setting {name}."
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"BlockPattern is immutable: build a new one instead of deleting {name}."
        )

    def __reduce__(self) -> Any:
        # copy and pickle would set the slots one by one
        return BlockPattern, (self.row, self.col, self.grid, self.block)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_mask(cls, mask: Any, block: Pair, *, capacity: Size | None = None) -> "BlockPattern":
        """The pattern that stores the True blocks of `mask` (r, c); `block` is `b` or `(br, bc)`.

        `capacity` (at least the number of True entries) makes room for more blocks; it must be
        given where `mask` is traced. A traced mask with more True entries than `capacity` gives a
        pattern of which no slot is valid, and `bsjax.check` says so.
        """
        r, c = validate.mask(mask)
        br, bc = validate.pair("from_mask", "block", block)
        if is_concrete(mask):
            col, row = np.nonzero(np.asarray(mask).T)
            row, col = validate.fill("from_mask", row, col, (r, c), capacity)
        else:
            if capacity is None:
                raise ValueError(
                    "from_mask: `mask` is traced, so the number of stored blocks is not known: "
                    "give `capacity=`, the most blocks that the pattern may ever hold."
                )
            capacity = validate.size("from_mask", "capacity", capacity)
            col, row = jnp.nonzero(mask.T, size=capacity, fill_value=-1)
            spare = jnp.arange(capacity) >= mask.sum()
            overflow = mask.sum() > capacity
            # past the spare slots: nothing reads such a slot, and `check` finds it
            row = jnp.where(overflow, r + 1, jnp.where(spare, r, row))
            col = jnp.where(overflow, c + 1, jnp.where(spare, c, col))
        return cls(as_leaf(row), as_leaf(col), (r, c), (br, bc))

    @classmethod
    def from_coords(
        cls, row: Any, col: Any, *, grid: Pair, block: Pair, capacity: Size | None = None
    ) -> tuple["BlockPattern", Int32[Array, " e"]]:
        """The pattern that stores blocks `(row[i], col[i])`, given in any order.

        Returns `(pattern, order)`: slot `i` of the pattern is entry `order[i]` of the input, so
        `values[order]` brings values along. Slots added by `capacity` have `order == -1`; what a
        spare slot holds is never read. Entries `(r, c)` of the input are spare slots themselves.
        """
        r, c = validate.pair("from_coords", "grid", grid, least=0)
        br, bc = validate.pair("from_coords", "block", block)
        row, col = validate.coords(row, col, (r, c))
        given = row.shape[0]
        capacity = validate.size("from_coords", "capacity", given if capacity is None else capacity)
        if capacity < given:
            raise ValueError(
                f"from_coords: {given} coordinates do not fit `capacity={capacity}`: "
                f"give at least {given}, or leave it out."
            )
        xp = namespace(row, col)
        # two stable sorts: first by row, then by column
        order = stable_argsort(row)
        order = order[stable_argsort(col[order])]
        row, col = row[order], col[order]
        extra = capacity - given
        row = xp.concatenate([row, xp.full(extra, r, xp.int32)])
        col = xp.concatenate([col, xp.full(extra, c, xp.int32)])
        order = xp.concatenate([order, xp.full(extra, -1, xp.int32)])
        if xp is np:
            validate.sorted_coords("from_coords", row, col, (r, c))
        return cls(as_leaf(row), as_leaf(col), (r, c), (br, bc)), as_leaf(order)

    # ------------------------------------------------------------------ sizes

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix: `(r * br, c * bc)`."""
        return self.grid[0] * self.block[0], self.grid[1] * self.block[1]

    @property
    def capacity(self) -> int:
        """`e`: the number of slots, stored and spare. Static."""
        return self.row.shape[-1]

    @property
    def nnz(self) -> Any:
        """The number of stored blocks: an int where it can be seen, else an integer array."""
        xp = namespace(self.col)
        stored = (xp.asarray(self.col) < self.grid[1]).sum(-1)
        return int(stored) if xp is np and self.col.ndim == 1 else stored

    @property
    def density(self) -> Any:
        """Stored blocks over all blocks of the grid (0 for an empty grid)."""
        return self.nnz / max(1, self.grid[0] * self.grid[1])

    # ------------------------------------------------------------------ views

    def mask(self) -> Bool[Any, "*h r c"]:
        """True where a block is stored: NumPy where it can be seen, else a traced array."""
        r, c = self.grid
        lead = self.row.shape[:-1]
        if is_concrete(self.row, self.col):
            row, col = np.asarray(self.row), np.asarray(self.col)
            # room for spare slots, and for those of a traced mask that did not fit
            mask = np.zeros((*lead, r + 2, c + 2), bool)
            mask[(*np.indices(row.shape, sparse=True)[:-1], row, col)] = True
            return mask[..., :r, :c]
        at = (*(i for i in jnp.indices(self.row.shape, sparse=True)[:-1]), self.row, self.col)
        return jnp.zeros((*lead, r, c), bool).at[at].set(True, mode="drop")

    def transpose(self) -> tuple["BlockPattern", Int32[Array, "*h e"]]:
        """`(pattern of the transpose, order)`, with values `values[order].swapaxes(-1, -2)`."""
        xp = namespace(self.row, self.col)
        row, col = xp.asarray(self.row), xp.asarray(self.col)
        # ours are sorted by column, so one stable sort by row gives (row, column)
        order = stable_argsort(row)
        row, col = (xp.take_along_axis(a, order, axis=-1) for a in (row, col))
        (r, c), (br, bc) = self.grid, self.block
        return BlockPattern(as_leaf(col), as_leaf(row), (c, r), (bc, br)), as_leaf(order)

    def equals(self, other: Any) -> bool:
        """Whether two concrete patterns have the same sizes, capacity and coordinates."""
        if not isinstance(other, BlockPattern):
            return False
        leaves = (self.row, self.col, other.row, other.col)
        if not is_concrete(*leaves):
            raise TypeError(
                "BlockPattern.equals: coordinates are traced, so they cannot be compared here: "
                "compare outside jit, or compare `row` and `col` as arrays."
            )
        return (
            (self.grid, self.block) == (other.grid, other.block)
            and np.array_equal(self.row, other.row)
            and np.array_equal(self.col, other.col)
        )

    def __repr__(self) -> str:
        sizes = f"grid={self.grid}, block={self.block}"
        if not self._drawable():
            return f"BlockPattern({sizes}, row={self.row!r}, col={self.col!r})"
        head = f"BlockPattern({sizes}, nnz={self.nnz}, capacity={self.capacity})"
        if not 0 < self.grid[0] * self.grid[1] <= 32 * 32 or max(self.grid) > 64:
            return head
        return "\n".join([head, *("  " + "".join(".#"[int(v)] for v in r) for r in self.mask())])

    def _drawable(self) -> bool:
        """Whether this is one pattern, seen and sound: a repr must not fail where others do."""
        leaves = (self.row, self.col)
        if not is_concrete(*leaves) or any(getattr(a, "dtype", None) != jnp.int32 for a in leaves):
            return False
        row, col = np.asarray(self.row), np.asarray(self.col)
        if row.ndim != 1 or row.shape != col.shape:
            return False
        try:
            validate.sorted_coords("repr", row, col, self.grid)
        except ValueError:
            return False
        return True

    # ------------------------------------------------------------------ pytree

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        key = jax.tree_util.GetAttrKey
        return ((key("row"), self.row), (key("col"), self.col)), (self.grid, self.block)

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.row, self.col), (self.grid, self.block)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "BlockPattern":
        p = object.__new__(cls)
        for name, value in zip(("row", "col", "grid", "block"), (*leaves, *static), strict=True):
            object.__setattr__(p, name, value)
        return p


# a function of a pattern can be exported and saved: its static sizes travel with the artefact
jax.export.register_pytree_node_serialization(
    BlockPattern,
    serialized_name="bsjax.BlockPattern",
    serialize_auxdata=lambda sizes: json.dumps(sizes).encode(),
    deserialize_auxdata=lambda saved: tuple(tuple(pair) for pair in json.loads(saved)),
)
