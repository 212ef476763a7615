"""Weights kept in host memory or on disk, and on the device only while they are needed. It works on any family.

A unit is what moves at a time: a block, a part of one (`phase`), or whatever else of the model. Its tensors, of any
dtype and stride, lie one behind the other in one slab (`slab.py`). Units come from host memory or from files
(`store.py`, `disk.py`) into a few slots (`ring.py`), and their modules see the slot for as long as they run
(`attach.py`). `load.py` builds a model block by block, so that it is never whole anywhere but where it is kept;
`choose.py` says beforehand how much memory each form takes, and which to take.
"""
