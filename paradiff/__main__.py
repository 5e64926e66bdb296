"""``python -m paradiff``, which is also what torchrun starts: ``torchrun ... -m paradiff run ...``."""

from paradiff.cli import main

if __name__ == "__main__":
    main()
