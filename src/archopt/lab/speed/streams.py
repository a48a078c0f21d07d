"""What a step must move: the one table behind every bound and every achieved bandwidth.

A stream is one reading or one writing of as many numbers as there are weights. A step that did nothing twice would
move, for weights w, gradients g, averages m and v, and a remembered movement d:

    copy            read b, write a
    add             read a and b, write a                                      a.add_(b)
    sgd             read w and g, write w
    nero            read w and g, write w; its state, one number a neuron, does not count
    agd             read g (the norms of all tensors come first); then as sgd
    adamw           read w, g, m and v; write w, m and v
    lamb            read w, g, m and v (norms of weights and direction, and whether g is finite); then as adamw
    madam           read g (whether it is finite); read w, g and v; write w and v
    autonero-turn   read g and d (norm of g, and g·d); read g and m, write m; read w and m, write w and d:
                    AutoNero without its orthogonalisation, which would read m and write what the turn then reads

torch keeps AdamW's m and v in the type of the weights; our rules keep statistics in float32 beside half-precision
weights. Steps whose time is matrix products (AutoNero's whole one, Muon's) have no such bound.
"""

from typing import NamedTuple

import torch

from archopt.neurons import statistics_dtype


class Streams(NamedTuple):
    """Numbers moved (or kept) for each weight: `own` in the type of the weights, `exact` in that of statistics."""

    own: int
    exact: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes for each weight of this type."""
        return self.own * dtype.itemsize + self.exact * statistics_dtype(dtype).itemsize


STREAMS = {
    "copy": Streams(2),
    "add": Streams(3),
    "sgd": Streams(3),
    "nero": Streams(3),
    "agd": Streams(4),
    "adamw": Streams(7),
    "lamb": Streams(5, 6),  # w twice read and once written, g twice read; m and v as w
    "madam": Streams(4, 2),
    "autonero-turn": Streams(4, 5),  # g and w twice; d once each way, m twice read and once written
}
