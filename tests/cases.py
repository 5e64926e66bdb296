"""Toy models and the specs of every strategy that the tests of strategies share."""

from __future__ import annotations

from dataclasses import replace

import toys

from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies import Workload, build, parse_spec

WORKLOAD = Workload(height=16, width=4, frames=1, steps=9)
DIT, JOINT, UNET = toys.transformer(), toys.transformer(joint=True), toys.unet(3)
SKIPS = replace(toys.transformer(6), name="toy-skips", skips=((0, 5), (1, 4)))
DIVIDED = toys.divided(DIT)
BOTH = ("serial", "cfg=2", "data=3", "patch=4", "patch=4,mode=naive", "cfg=2,patch=2")
SPECS = {
    "toy-dit": (
        *BOTH,
        "ulysses=2",
        "ulysses=4",
        "ring=4",
        "ring=4,rotate=allgather",
        "ulysses=2,ring=2",
        "cfg=2,ulysses=2,ring=2",
        "ulysses=4,ring=2,exchange=2x2",
        "pipefusion=2,ulysses=4,exchange=2x2,patches=2",
        "distrifusion=4,warmup=2",
        "cfg=2,distrifusion=2,warmup=1,bucket=1",
        "distrifusion=4,bucket=3",
        "distrifusion=4,bucket=2,warmup=0",
        "pcpp=4,warmup=1",
        "pcpp=4,slice=sender,portion=0.5,warmup=1",
        "pipefusion=2",
        "pipefusion=4,patches=8",
        "pipefusion=2,patches=4,stages=1:3,prepost=false",
        "pipefusion=2,ulysses=2,patches=2",
        "cfg=2,pipefusion=2,ring=2,patches=2",
        "pipefusion=4,ulysses=2,patches=4",  # one attention a stage: its work buffers recur at once
        "pipefusion=2,patches=3,warmup=9",
        "data=2,cfg=2,pipefusion=2",
        "asyncdiff=2,warmup=1",
        "asyncdiff=3,warmup=2,stride=2",
        "asyncdiff=2,warmup=1,stride=2",
        "asyncdiff=4,cuts=1:2:3,warmup=3",
        "cfg=2,asyncdiff=2,warmup=1",
        "data=2,cfg=2,asyncdiff=2,warmup=2,stride=2",
        "parastep=2,warmup=1",
        "parastep=4,warmup=2",
        "parastep=3,warmup=5",
        "parastep=2,cfg=2,ulysses=2,warmup=1",
        "data=2,parastep=2,ring=2,warmup=2",
        "parastep=2,patch=4,warmup=1",
        "batchstep=2,warmup=1",
        "data=2,batchstep=4,warmup=2",
        "cfg=2,offload=text+vae",
        "cfg=2,ulysses=2,cache=2",
        "streambatch=4",
        "data=2,streambatch=2,ring=2",
        "ring=2,skip=1:2:5",
        "ulysses=2,ring=2,weights=hsdp",
        "distrifusion=4,warmup=1,weights=hsdp,offload=text",
        "cfg=2,pipefusion=2,ring=2,patches=2,weights=fp8+hsdp,offload=vae",
    ),
    "divided-toy-dit": (
        "tensor=2",
        "tensor=4",
        "cfg=2,tensor=2",
        "tensor=2,ulysses=2",
        "tensor=2,ring=2",
        "tensor=2,pipefusion=2,patches=4",
        "cfg=2,tensor=2,pipefusion=2,ulysses=2,patches=2",
        "data=2,tensor=2",
        "parastep=2,tensor=2,warmup=1",
    ),
    "toy-unet": (
        *BOTH,
        *(
            f"distrifusion=4,warmup=1,mode={mode}"
            for mode in (
                "corrected_async_gn",
                "stale_gn",
                "sync_gn",
                "separate_gn",
                "no_sync",
                "full_sync",
            )
        ),
        "distrifusion=4,warmup=1,bucket=3",
        "cfg=2,distrifusion=2,warmup=1,bucket=1",
        "pcpp=4,warmup=1,bucket=2",
        "asyncdiff=2,warmup=1",
        "asyncdiff=3,warmup=2,stride=2",
        "cfg=2,asyncdiff=2,warmup=1,stride=2",
        "data=2,asyncdiff=2,warmup=1",
        "parastep=4,warmup=2",
        "cfg=2,parastep=2,patch=2,warmup=1",
        "batchstep=4,warmup=3",
        "cfg=2,patch=4,weights=hsdp",
        "data=2,cache=4",
        "cfg=2,streambatch=3,patch=2",
        "asyncdiff=2,warmup=1,weights=fp8,offload=text",
    ),
}
CASES = [(DIT, s) for s in SPECS["toy-dit"]] + [(JOINT, s) for s in SPECS["toy-dit"]]
CASES += [(UNET, s) for s in SPECS["toy-unet"]]
CASES += [
    (SKIPS, s)
    for s in (
        "pipefusion=2,patches=4",
        "cfg=2,pipefusion=3,patches=3,prepost=false",
        "pipefusion=3,ulysses=2,patches=2",
        "asyncdiff=3,warmup=2",
    )
]
CASES += [(DIVIDED, s) for s in SPECS["divided-toy-dit"]]
IDS = [f"{p.name}{'-joint' * (p is JOINT)}-{s}" for p, s in CASES]


def graph_of(profile: Profile, spec: str, workload: Workload = WORKLOAD) -> ScheduleGraph:
    return build(parse_spec(spec), profile, workload)
