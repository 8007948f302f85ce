"""The entry point of `mlxfun-shell`: an interrupt during the first imports is no traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `commands.cli.main`. Exits with 130 if Ctrl-C comes before it is imported."""
    try:
        from commands.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
