"""Step level, for throughput: a pipeline over denoising steps (StreamDiffusion, strategies.md 18.1).

Group d takes an equal share of the steps of every request and hands the latent on, so that as many
requests are under way as there are groups. Exact; one request is no faster. The schedule is that of one
request: each rank is free for the next when its own share is done.
"""

from __future__ import annotations

from paradiff.strategies.builder import Builder, Infeasible, Options, strip
from paradiff.strategies.passes import strip_pass, whole_pass


def streambatch(build: Builder, options: Options) -> None:
    """Steps d T/n to (d+1) T/n of a request on group d, each step by one rank or on any exact pass."""
    degree, steps = int(options["streambatch"]), build.workload.steps
    if not 2 <= degree <= steps:
        raise Infeasible(
            f"streambatch={degree}: between 2 and {steps} groups, each with a step of its own",
            f"streambatch={min(max(2, degree), steps)}" if steps > 1 else "serial",
        )
    predict = (strip_pass if "patch" in options else whole_pass)(build, options)
    replicas = list(build.mesh.step_groups())
    ranks = [[[r for lane in group for r in lane.ranks] for group in groups] for groups in replicas]
    size = build.latent_bytes(build.rows, build.workload.batch)
    first_group = {rank for groups in ranks for rank in groups[0]}
    build.encode(starts=first_group.__contains__)
    for d in range(degree):
        first, last = strip(steps, degree, d)
        with build.section(f"hop{d}", first, int(d > 0)):
            for groups in ranks if d else ():
                for a, b in zip(groups[d - 1], groups[d], strict=True):
                    build.send("x", a, b, size, build.x(a), [build.x(b)])
        with build.section(f"stage{d}", first, last - first):
            for lanes in (groups[d] for groups in replicas):
                for rank, eps in predict(lanes, 0, build.x).items():
                    build.update(rank, [eps], [build.x(rank, 1)])
    with build.section("decode", steps):
        for groups in ranks:
            build.decode(groups[-1][0], [build.x(groups[-1][0])])
