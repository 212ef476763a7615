"""Feature caches: what the blocks made at one step is used again at others. `build` chooses one."""

from lightx2v.features.cache.build import READS, build
from lightx2v.features.cache.calibration import Calibration
from lightx2v.features.cache.facts import Facts
from lightx2v.features.cache.report import Cache, CacheReport

__all__ = ["READS", "Cache", "CacheReport", "Calibration", "Facts", "build"]
