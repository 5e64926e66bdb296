"""Run by tests/test_network.py under the system's Python, where Debian installs SimGrid.

Reads {"capacities": [...], "flows": [{"usage": [[resource, weight], ...], "nbytes", "start_s"}]} from
standard input and prints the finish time of each flow as SimGrid's raw max-min model has it. A
weight of two is a link that occurs twice in the route.
"""

import json
import sys

import simgrid


def main() -> None:
    case = json.load(sys.stdin)
    engine = simgrid.Engine(
        [
            "flows",
            "--cfg=network/model:CM02",
            "--cfg=network/crosstraffic:0",
            "--cfg=network/TCP-gamma:0",
            "--cfg=maxmin/precision:1e-9",
            "--cfg=surf/precision:1e-12",
        ]
    )
    zone = simgrid.NetZone.create_full_zone("zone")
    links = [zone.create_link(f"r{i}", c) for i, c in enumerate(case["capacities"])]
    for link in links:
        link.set_latency(0.0)
    ends = [0.0] * len(case["flows"])

    def send(i, flow, source, destination):
        simgrid.this_actor.sleep_until(flow["start_s"])
        simgrid.Comm.sendto_async(source, destination, int(flow["nbytes"])).wait()
        ends[i] = simgrid.Engine.clock

    for i, flow in enumerate(case["flows"]):
        source, destination = zone.create_host(f"s{i}", 1e9), zone.create_host(f"d{i}", 1e9)
        route = [
            simgrid.LinkInRoute(links[r]) for r, weight in flow["usage"] for _ in range(int(weight))
        ]
        zone.add_route(source.netpoint, destination.netpoint, None, None, route, False)
        simgrid.Actor.create(f"a{i}", source, send, i, flow, source, destination)
    zone.seal()
    engine.run()
    sys.stdout.write("RESULT" + json.dumps(ends) + "\n")


main()
