"""Hosts on one machine, joined by links of known rate: where predictions meet real transfers."""
