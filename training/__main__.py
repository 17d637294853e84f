"""``python -m training``: the same as ``segnode-train``."""

from training.cli import main

if __name__ == "__main__":
    main()
