"""``python -m remote_modules`` is the command ``remote-modules``."""

from __future__ import annotations

from remote_modules.cli.main import main

if __name__ == "__main__":
    main()
