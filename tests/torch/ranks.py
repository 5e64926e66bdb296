"""One rank of a launch that runs many cases, as a script: ``torchrun ranks.py CASES.json``.

Rank 0 prints a line of JSON for each case: how far the latents are from those of all ranks in one
process, and whether the trace is a legal run of the graph.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import plain_loops as plain
from test_executor_decoding import pipeline
from test_executor_strips import graph_of, request_of

from paradiff.executor.decoding import strip_decoder
from paradiff.executor.distributed import run_rank
from paradiff.executor.interpreter import run_graph
from paradiff.executor.network import Network
from paradiff.executor.session import Place, Session
from paradiff.trace import check_trace


def main(cases: list[tuple[str, str]]) -> None:
    warnings.simplefilter("ignore")
    place = Place.of_environment()
    assert place is not None
    session = Session.join(place, 120.0, "cpu", "tests")
    for name, spec in cases:
        graph = graph_of(name, spec, steps=4)
        profile, model = plain.twin(name)
        replicas = 2 if "data" in spec else 1
        request = request_of(name, replicas)
        if "vae=split" in spec:
            request = replace(request, strips=strip_decoder(pipeline(name)))
        result = run_rank(graph, Network(model, profile), request, session)
        check_trace(graph, result.trace)
        if session.rank == 0:
            expected = run_graph(graph, Network(model, profile), request)
            pairs = [(result.latents[k], x) for k, x in expected.latents.items()]
            pairs += [(result.decoded[k], x) for k, x in expected.decoded.items()]
            error = max(plain.relative(*pair) for pair in pairs)
            line = {"case": [name, spec], "error": error, "replicas": sorted(result.latents)}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    session.leave()


if __name__ == "__main__":
    main([tuple(case) for case in json.loads(Path(sys.argv[1]).read_text())])
