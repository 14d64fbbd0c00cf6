"""Swarms for tests, examples and demonstrations, and ways to break them.

`LocalSwarm` runs real peers on this machine, `FaultyLink` breaks a connection on purpose;
`remote_modules.testing.simulation` runs a whole swarm in one process under virtual time.
"""

from remote_modules.testing.faulty_link import Fault, FaultyLink
from remote_modules.testing.local_swarm import LocalSwarm

__all__ = ["Fault", "FaultyLink", "LocalSwarm"]
