"""``python -m slablm`` is ``slablm``."""

from slablm.cli import main

if __name__ == "__main__":
    main()
