"""Runs schedule graphs on real diffusers modules."""
