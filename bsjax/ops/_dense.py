"""The products by way of the dense matrix: what `auto` runs where so many blocks are stored that
leaving the others out does not pay."""

from bsjax.ops._reference import fromdense as fromdense
from bsjax.ops._reference import matmul as matmul
from bsjax.ops._reference import sddmm as sddmm
from bsjax.ops._reference import todense as todense
