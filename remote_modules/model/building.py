"""One model is built at a time in a process.

transformers replaces functions of its own while it builds and loads a model (`tie_weights`, initializers), and puts
back what it found: of two threads that overlap, one puts back the other's replacement, for good.
"""

from __future__ import annotations

import threading

__all__ = ["building"]

building = threading.RLock()
