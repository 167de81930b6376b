"""``python -m maml``: the console script ``maml``, where that is not installed (torchrun -m maml train ...)."""

from maml.cli import main

if __name__ == "__main__":
    main()
