"""What TCP over Ethernet adds to a network: headers, acknowledgements, the bucket of a shaped link.

From the sizes of headers alone, nothing is fitted. A link's bandwidth is then its rate on the wire:

- a full packet carries 1448 bytes of payload in 1514: MTU 1500, less IPv4 (20), TCP (20) and its
  timestamps (12), plus Ethernet (14), which tc's token bucket counts too;
- every second packet is acknowledged by one of 66 bytes the other way (RFC 1122, 4.2.3.2);
- a link that has been idle sends what its bucket holds at once, and then at its rate (tc-tbf(8)).
"""

from __future__ import annotations

from simulator.network import Network, Route
from simulator.topology import Topology

MTU = 1500
IP_AND_TCP, ETHERNET = 52, 14
PAYLOAD = MTU - IP_AND_TCP
WIRE_SHARE = (MTU + ETHERNET) / PAYLOAD
"""Bytes on the wire for a byte of payload: 1.0456, so a link of 1 Gbit/s carries 0.9564."""
ACK_SHARE = (IP_AND_TCP + ETHERNET) / (2 * PAYLOAD)
"""Bytes the other way for a byte of payload: 0.0228."""


class TcpNetwork(Network):
    """``topology``, whose links carry TCP and hold ``bucket_bytes`` when idle."""

    def __init__(self, topology: Topology, bucket_bytes: float = 0.0) -> None:
        super().__init__(topology)
        self.bucket_bytes = bucket_bytes

    def _new_route(self, source: int, destination: int) -> Route:
        """Of each link its share there, and that of acknowledgements back."""
        route = super()._new_route(source, destination)
        usage = {resource: weight * WIRE_SHARE for resource, weight in route.resources}
        back = super()._new_route(destination, source)
        for resource, weight in back.resources:
            usage[resource] = usage.get(resource, 0.0) + weight * ACK_SHARE
        return Route(route.id, tuple(sorted(usage.items())), route.latency_s, route.path, False)
