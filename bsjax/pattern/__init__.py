"""The one noun: which blocks exist."""

from bsjax.pattern._check import check as check
from bsjax.pattern._core import BlockPattern as BlockPattern
from bsjax.pattern._index import is_concrete as is_concrete
from bsjax.pattern._index import pointers as pointers
from bsjax.pattern._partition import partition as partition

__all__ = ["BlockPattern", "check", "partition"]
