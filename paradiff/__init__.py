"""paradiff: which parallel strategy should run this diffusion model on this box, and is that true?"""

__version__ = "0.1.0"
