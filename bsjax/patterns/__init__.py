"""Which blocks to store: generators of bool masks, and numbers that describe a mask.

A mask is a plain numpy array (r, c), so masks compose with `&`, `|`, `~` and become patterns by
`BlockPattern.from_mask(mask, block=64)`. The same arguments and seed give the same mask.
"""

from bsjax.patterns._attention import bigbird
from bsjax.patterns._diagnostics import (
    DegreeBalance,
    Degrees,
    average_path_length,
    clustering,
    degree_balance,
    mixing_profile,
    small_world,
    spectral_gap,
)
from bsjax.patterns._graphs import (
    barabasi_albert,
    butterfly,
    strides,
    watts_strogatz,
    watts_strogatz_2d,
)
from bsjax.patterns._grids import (
    balanced,
    banded,
    block_diagonal,
    global_blocks,
    lower_triangular,
    random,
    stretch,
)
from bsjax.patterns._groups import grouped, reads_per_block, similar_columns

__all__ = [
    "DegreeBalance",
    "Degrees",
    "average_path_length",
    "balanced",
    "banded",
    "barabasi_albert",
    "bigbird",
    "block_diagonal",
    "butterfly",
    "clustering",
    "degree_balance",
    "global_blocks",
    "grouped",
    "lower_triangular",
    "mixing_profile",
    "random",
    "reads_per_block",
    "similar_columns",
    "small_world",
    "spectral_gap",
    "stretch",
    "strides",
    "watts_strogatz",
    "watts_strogatz_2d",
]
