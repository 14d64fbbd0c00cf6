from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tiny_models import NUM_BLOCKS, save_tiny
from transformers import PreTrainedModel

from remote_modules.model.loading import load_span
from remote_modules.spans import Span

from .support import opened


def test_threads_that_load_at_once_leave_transformers_as_it_was(tmp_path: Path) -> None:
    """Peers in one process load when they like, and so does their client."""
    checkpoint, config, cls = opened(save_tiny(tmp_path))
    tie_weights = PreTrainedModel.tie_weights

    def load(number: int) -> None:
        block = number % NUM_BLOCKS
        load_span(checkpoint, config, cls, Span(block, block + 1))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(load, range(40)))
    assert PreTrainedModel.tie_weights is tie_weights
