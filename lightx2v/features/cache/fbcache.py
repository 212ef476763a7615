"""FBCache, first-block cache (ParaAttention, Cheng 2025): DBCache with one first block, no last ones and no warm-up."""

from __future__ import annotations

from lightx2v.features.cache.dbcache import DBCache
from lightx2v.features.cache.store import Holding

THRESHOLD = 0.05


class FBCache(DBCache):
    method = "fbcache"

    def __init__(self, holding: Holding, threshold: float = THRESHOLD, order: int = 0, separate: bool = False) -> None:
        super().__init__(holding, threshold, first_blocks=1, last_blocks=0, warmup=0, order=order, separate=separate)
