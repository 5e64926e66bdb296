"""Shipped hardware and model data; see README.md. Found by ``paradiff.config.find``."""
