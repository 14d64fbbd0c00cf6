from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded llama of four blocks; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("llama"))
