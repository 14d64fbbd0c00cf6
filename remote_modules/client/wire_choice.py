"""How the tensors of one session or pass travel, where the client leaves that to be chosen (``wire="auto"``).

It is chosen once, along the first route, by what was measured until then (`plan.wire_choice`), and kept through
retries, replays, forks and the backward: what peers see of one session or pass is coded in one way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from remote_modules.client.call import Named
from remote_modules.client.coding import Coding
from remote_modules.client.swarm import Swarm
from remote_modules.plan.routing import Demand, Hop

__all__ = ["coding_for"]

logger = logging.getLogger(__name__)

FORMS = ("int8", "int4")  # the first loses least


def coding_for(
    swarm: Swarm, hops: Sequence[Hop], demand: Demand, inputs: Named, num_tokens: int, *, is_pipelined: bool = False
) -> Coding:
    """Of what goes along ``hops``.

    Args:
        demand: of ``inputs``, as they are.
        num_tokens: of each row in them.
    """
    if swarm.config.wire != "auto":
        return swarm.coding
    names, total = swarm.coding.names, max(1, demand.rows * num_tokens)
    coded_bytes = {form: -(-Coding(form, names).num_bytes(inputs, num_tokens) // total) for form in FORMS}
    wire = swarm.router.choose_wire(hops, demand, coded_bytes, is_pipelined=is_pipelined)
    if wire != swarm.stats.wire:
        logger.info("wire %s tokens=%d bytes_per_token=%d", wire, total, demand.bytes_per_token)
    swarm.stats.wire = wire
    return Coding(wire, names)
