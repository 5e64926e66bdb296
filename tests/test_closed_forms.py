"""Every strategy's published timing formula, from its real emitter, in unit hardware.

1 FLOP/s a GPU, ideal links of a chosen bandwidth, no latency, no launches: the formula remains.
The model ``plain`` has work in its blocks alone, one evaluation a step, and hidden states as large as
its latent, so that the hops of a pipeline are all equal.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import toys

from analysis.attribution import attribute
from paradiff.graph import ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies import Workload, build, parse_spec
from paradiff.trace import check_trace
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.partition import Partition
from simulator.topology import Topology

ROWS, WIDTH, BLOCKS, ELEMENT = 16, 4, 4, 2
PLAIN = toys.plain(BLOCKS)
X = 8 * ROWS * WIDTH * ELEMENT
"""Bytes of a latent, and of the hidden state between blocks."""
SHAPE = {"b": 1, "f": 1, "r": ROWS, "w": WIDTH, "k": ROWS, "t": 0, "s": 0, "h": 0}
FORWARD = PLAIN.denoiser.flops(SHAPE)
"""Seconds of one whole forward: every kernel is linear in rows, so a strip of 1/n costs 1/n."""


def denoise_s(
    spec: str,
    bandwidth: float,
    steps: int = 12,
    profile: Profile = PLAIN,
    *,
    periodic: bool = True,
) -> float:
    """Simulated seconds of the whole run (everything outside the loop costs nothing)."""
    graph = build(parse_spec(spec), profile, Workload(ROWS, WIDTH, 1, steps, 1, "fp16"))
    topology = Topology.uniform(graph.world_size, bandwidth_bytes_per_s=bandwidth)
    costs = CostModel(profile, [load_gpu("unit")] * graph.world_size, "fp16")
    trace = simulate(graph, topology, costs, periodic=periodic)
    check_trace(graph, trace)
    return trace.makespan_s


def step_s(spec: str, bandwidth: float, profile: Profile = PLAIN) -> float:
    """Seconds of one steady step: the difference of two long runs."""
    return (denoise_s(spec, bandwidth, 40, profile) - denoise_s(spec, bandwidth, 20, profile)) / 20


def exactly(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def test_serial_and_data() -> None:
    """T forwards; replicas do not slow each other."""
    assert denoise_s("serial", 1) == exactly(12 * FORWARD)
    assert denoise_s("data=3", 1) == exactly(12 * FORWARD)


def test_cfg_step() -> None:
    """F(g=1) + all-gather of X e over two ranks + guidance + scheduler (section 2.8)."""
    toy = toys.transformer()
    branch = toy.denoiser.flops({**SHAPE, "t": 6})
    glue = sum(toy.stages[s].flops(SHAPE) for s in ("guidance", "scheduler"))
    latent = 4 * ROWS * WIDTH * ELEMENT
    assert step_s("cfg=2", 10.0, toy) == exactly(branch + latent / 10.0 + glue)


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_step(n: int) -> None:
    """F/n + 4 L all-to-alls of (n-1)/n (s/n) h e + the output's all-gather, all blocking."""
    exchange = (n - 1) / n * (X / n)
    gather = (n - 1) * X / n
    assert step_s(f"ulysses={n}", 7.0) == exactly(
        FORWARD / n + (4 * BLOCKS * exchange + gather) / 7.0
    )


@pytest.mark.parametrize("bandwidth", [0.02, 0.5, 50.0])
@pytest.mark.parametrize("n", [2, 4])
def test_ring_step(n: int, bandwidth: float) -> None:
    """A layer's ring: iterations of max(block attention, block transfer), the last without transfer.

    A block holds K and V, 2 (s/n) h e bytes; its attention is 1/n^2 of the layer's whole attention.
    """
    attention = 2 * 4 * (ROWS * WIDTH) ** 2 * 4
    block, transfer = attention / n**2, 2 * X / n / bandwidth
    layer = (n - 1) * max(block, transfer) + block
    rest = (FORWARD - BLOCKS * attention) / n
    gather = (n - 1) * X / n / bandwidth
    assert step_s(f"ring={n}", bandwidth) == exactly(rest + BLOCKS * layer + gather)


def test_allgather_ring_never_overlaps() -> None:
    """diffusers' ring: F/n + L (n-1) 2 X/n + gather."""
    n, bandwidth = 4, 50.0
    moved = (n - 1) * X / n * (2 * BLOCKS + 1)
    spec = f"ring={n},rotate=allgather"
    assert step_s(spec, bandwidth) == exactly(FORWARD / n + moved / bandwidth)


DIVIDED = toys.divided(PLAIN)
DIVIDED_FORWARD = DIVIDED.denoiser.flops(SHAPE)


@pytest.mark.parametrize("n", [2, 4])
def test_tensor_step(n: int) -> None:
    """sum(comp)/n + 2 L all-reduces of b s h, each 2 (n-1)/n of it (section 4.8)."""
    moved = 2 * BLOCKS * 2 * (n - 1) / n * X
    assert step_s(f"tensor={n}", 7.0, DIVIDED) == exactly(DIVIDED_FORWARD / n + moved / 7.0)


def test_tensor_and_ulysses_step() -> None:
    """Half the tokens and half the heads: all-reduces of X/2, all-to-alls of a quarter, 2 ranks each;
    then the halves of the output are gathered, by both ranks of a tensor group."""
    sums, exchanges, gather = 2 * (X / 2), 4 * (X / 4) / 2, X / 2
    moved = BLOCKS * (sums + exchanges) + gather
    step = step_s("tensor=2,ulysses=2", 7.0, DIVIDED)
    assert step == exactly(DIVIDED_FORWARD / 4 + moved / 7.0)


def test_tensor_and_ring_step() -> None:
    """A ring of half the heads; transfers are much faster than blocks, so the ring hides them all."""
    moved = BLOCKS * 2 * (X / 2) + X / 2
    step = step_s("tensor=2,ring=2", 50.0, DIVIDED)
    assert step == exactly(DIVIDED_FORWARD / 4 + moved / 50.0)


def test_tensor_inside_pipefusion() -> None:
    """Without hops: tau = F/(N M n) and 2 L/N all-reduces of X/M a micro-step; period M times that."""
    n, m, bandwidth = 2, 4, 7.0
    micro = DIVIDED_FORWARD / (2 * m * n) + 2 * BLOCKS / 2 * (X / m) / bandwidth
    hop = X / m / bandwidth
    period = max(m * micro, 2 * (micro + hop))
    spec = f"tensor={n},pipefusion=2,patches={m}"
    assert step_s(spec, bandwidth, DIVIDED) == exactly(period)


def test_hybrid_cfg_ulysses_step() -> None:
    """Half the rows of one branch, 4 L exchanges, gather of rows, then of branches."""
    toy, bandwidth = toys.transformer(), 3.0
    branch = toy.denoiser.flops({**SHAPE, "t": 6})
    glue = sum(toy.stages[s].flops(SHAPE) for s in ("guidance", "scheduler"))
    hidden, latent = 8 * ROWS * WIDTH * ELEMENT, 4 * ROWS * WIDTH * ELEMENT
    moved = 4 * BLOCKS * (hidden / 2) / 2 + latent / 2 + latent
    assert step_s("cfg=2,ulysses=2", bandwidth, toy) == exactly(
        branch / 2 + moved / bandwidth + glue
    )


def test_synchronous_patch_step() -> None:
    """F/n + L blocking all-gathers of K and V + the output's (section 9.3)."""
    n, bandwidth = 4, 5.0
    moved = (n - 1) / n * (2 * X * BLOCKS + X)
    assert step_s(f"patch={n}", bandwidth) == exactly(FORWARD / n + moved / bandwidth)


def test_distrifusion_step_hides_its_buckets() -> None:
    """Compute-bound: F/n + the blocking output gather, and nothing else (section 10).

    One bucket of L tensors leaves when the last layer has published: layer 4's attention and what
    follows it, and the next step up to layer 1, are there to hide it; here it is far smaller. It runs
    beside the output gather on the same links, so bandwidth is high enough for it to be gone before.
    """
    n, bandwidth = 4, 1.0
    gather = (n - 1) * X / n / bandwidth
    assert step_s(f"distrifusion={n},warmup=2", bandwidth) == exactly(FORWARD / n + gather)


def test_distrifusion_step_when_the_link_paces() -> None:
    """Link-bound: never below the bytes of a step over the bandwidth, nor below compute + gather."""
    n, bandwidth = 4, 0.01
    moved = (n - 1) / n * (2 * X * BLOCKS + X)
    step = step_s(f"distrifusion={n},warmup=2", bandwidth)
    assert step >= moved / bandwidth
    assert step <= moved / bandwidth + FORWARD / n


PIPELINES = [
    # stages, patches, seconds of a hop over those of a micro-step
    (2, 4, 0.25),
    (4, 4, 0.0),
    (4, 4, 0.5),
    (4, 8, 0.5),
    (2, 8, 2.0),  # the link sets the pace
    (4, 16, 1.5),
    (4, 2, 0.25),  # fewer patches than stages: bubbles
]


@pytest.mark.parametrize(("n", "m", "ratio"), PIPELINES)
def test_pipefusion_period_and_makespan(n: int, m: int, ratio: float) -> None:
    """max(M tau, M c, N (tau + c)) a step; N tau + (N-1) c + (M-1) max(tau, c) + (T_a-1) period.

    tau = F/(N M), hops c all equal; warm-up w = 1 costs F and N hops of the whole image (12.2, 12.3).
    """
    tau = FORWARD / n / m
    bandwidth = X / m / (ratio * tau) if ratio else float("inf")
    c, steps = ratio * tau, 12
    period = max(m * tau, m * c, n * (tau + c))
    warm = FORWARD + n * m * c
    stale = n * tau + (n - 1) * c + (m - 1) * max(tau, c) + (steps - 2) * period
    assert denoise_s(f"pipefusion={n},patches={m},warmup=1", bandwidth) == exactly(warm + stale)


def test_pipefusion_example_of_section_12() -> None:
    """N = 2, M = 4, w = 1, T = 4, no hops: the last patch ends at 21 tau, serial at 32 tau."""
    tau = FORWARD / 8
    assert denoise_s("pipefusion=2,patches=4", float("inf"), 4) == exactly(21 * tau)
    assert denoise_s("pipefusion=4,patches=4", float("inf"), 4) == exactly(31 * FORWARD / 16)


def test_late_receives_expose_every_hop() -> None:
    """prepost=false: the receive of p + 1 waits for computation p, period M (tau + c) (12.3)."""
    n, m = 2, 8
    tau = FORWARD / n / m
    c = tau / 4
    spec = f"pipefusion={n},patches={m},prepost=false"
    assert step_s(spec, X / m / c) == exactly(m * (tau + c))


@pytest.mark.parametrize("ratio", [0.1, 0.9, 2.5])
@pytest.mark.parametrize("stages", ["1:3", "3:1", "2:1:1"])
def test_uneven_stages_against_an_event_recurrence(stages: str, ratio: float) -> None:
    """start(t,p,d) = max(own stage free, arrival); a message starts when sent and the channel is free.

    Written from section 12's rules as a recurrence over (step, patch, stage), independent of the
    engine; channels of different directed pairs do not meet on an ideal switch unless N = 2 stages
    share nothing: each rank's send and receive sides are separate.
    """
    counts = [int(c) for c in stages.split(":")]
    n, m, steps = len(counts), 4, 7
    tau = [FORWARD * c / BLOCKS / m for c in counts]
    c = ratio * FORWARD / n / m
    free, channel = [0.0] * n, [0.0] * n
    now = FORWARD + n * m * c
    arrival = {(1, p, 0): now for p in range(m)}
    end = now
    free = [now] * n
    for t, p in itertools.product(range(1, steps), range(m)):
        for d in range(n):
            free[d] = max(free[d], arrival[t, p, d]) + tau[d]
            channel[d] = max(channel[d], free[d]) + c
            arrival[(t, p, d + 1) if d < n - 1 else (t + 1, p, 0)] = channel[d]
        end = free[n - 1]
    spec = f"pipefusion={n},patches={m},stages={stages}"
    assert denoise_s(spec, X / m / c, steps) == exactly(end)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9, 2.5])
@pytest.mark.parametrize("stages", ["1:3", "3:1", "2:1:1", "1:1:2"])
@pytest.mark.parametrize("m", [2, 4])
def test_period_of_uneven_stages(stages: str, m: int, ratio: float) -> None:
    """max(M tau_d, M c, sum of tau_d + N c): the stage, the link, or the way of one patch around, of
    which N - 1 messages go forward and one goes back. What ``partition`` minimises."""
    counts = [int(c) for c in stages.split(":")]
    tau = [FORWARD * c / BLOCKS / m for c in counts]
    c = ratio * FORWARD / len(counts) / m
    around = Partition(max(*tau, c), sum(tau) + len(counts) * c, tuple(counts), ())
    period = max(m * max(tau), m * c, sum(tau) + len(counts) * c)
    spec = f"pipefusion={len(counts)},patches={m},stages={stages}"
    assert step_s(spec, X / m / c if c else float("inf")) == exactly(period)
    assert around.period_s(m) == exactly(period)


@pytest.mark.parametrize(("m", "ratio"), [(4, 0.1), (4, 0.6), (4, 2.0), (2, 0.5)])
def test_skips_share_the_link_of_the_hidden_states(m: int, ratio: float) -> None:
    """Two stages, one skip between them: max(M tau, 2 M c, 2 tau + 3 c) a step.

    Hidden state and skip of a patch leave together on channels of their own, but through one link: both
    are there after 2 c, c = X / M / bandwidth. The loop is two micro-steps, this hop, and the latent's.
    """
    tau = FORWARD / 2 / m
    c = ratio * tau
    toy = replace(PLAIN, skips=((0, 3),))
    period = max(m * tau, 2 * m * c, 2 * tau + 3 * c)
    assert step_s(f"pipefusion=2,patches={m}", X / m / c, toy) == exactly(period)


def test_asyncdiff_round() -> None:
    """max C(f_i) + broadcasts at the cuts + broadcast of the prediction (section 13.3)."""
    n, bandwidth = 4, 6.0
    moved = (n - 1) * X + X
    assert step_s(f"asyncdiff={n},warmup=1", bandwidth) == exactly(FORWARD / n + moved / bandwidth)


def test_asyncdiff_stride_2_round() -> None:
    """Two steps a round: one computation, one set of broadcasts, two predictions broadcast."""
    n, bandwidth = 2, 6.0
    moved = (n - 1) * X + 2 * X
    spec = f"asyncdiff={n},stride=2,warmup=1"
    two = (denoise_s(spec, bandwidth, 41) - denoise_s(spec, bandwidth, 21)) / 10
    assert two == exactly(FORWARD / n + moved / bandwidth)


def test_asyncdiff_round_of_two_branches() -> None:
    """Half of one branch + 2 X e + guidance + scheduler: the cycle of the last component's rank.

    Its prediction X e goes to its twin at once. Into its link comes meanwhile the boundary's hidden
    state (8 channels to the latent's 4), so that the twin's takes twice as long and the hidden state
    is there before the scheduler is done. The broadcast of the prediction goes out of the other side.
    """
    toy, bandwidth = toys.transformer(), 6.0
    branch = toy.denoiser.flops({**SHAPE, "t": 6})
    glue = sum(toy.stages[s].flops(SHAPE) for s in ("guidance", "scheduler"))
    moved = 2 * 4 * ROWS * WIDTH * ELEMENT
    for dp in ("", "data=2,"):
        step = step_s(f"{dp}cfg=2,asyncdiff=2,warmup=1", bandwidth, toy)
        assert step == exactly(branch / 2 + moved / bandwidth + glue)


@pytest.mark.parametrize("p", [2, 4])
def test_parastep_cycle(p: int) -> None:
    """T_F + (p-1) t_recv + t_bcast for p steps: the predictions meet on rank 0's link (14.3)."""
    bandwidth = 5.0
    spec = f"parastep={p},warmup=1"
    steps = 10 * p + 1
    cycle = (denoise_s(spec, bandwidth, 2 * steps - 1) - denoise_s(spec, bandwidth, steps)) / 10
    assert cycle == exactly(FORWARD + ((p - 1) * X + X) / bandwidth)


@pytest.mark.parametrize("n", [2, 4])
def test_parastep_cycle_over_ulysses(n: int) -> None:
    """A cycle of 2 steps: one Ulysses step (above) without its scheduler, the message of each rank to
    its twin, and the broadcasts of the latent from twin to twin, all at the same time."""
    bandwidth, steps = 5.0, 21
    spec = f"parastep=2,ulysses={n},warmup=1"
    cycle = (denoise_s(spec, bandwidth, 2 * steps - 1) - denoise_s(spec, bandwidth, steps)) / 10
    assert cycle == exactly(step_s(f"ulysses={n}", bandwidth) + 2 * X / bandwidth)


@pytest.mark.parametrize("p", [2, 4])
def test_batchstep_cycle(p: int) -> None:
    """p steps are one forward of p times the batch, on one device: in unit hardware nothing is won."""
    assert step_s(f"batchstep={p},warmup=4", 1.0) == exactly(FORWARD)


@pytest.mark.parametrize("every", [2, 3, 6])
def test_cached_steps(every: int) -> None:
    """One whole step in K, and K - 1 of the last of L equal blocks; 12 steps."""
    cheap = FORWARD / BLOCKS
    whole = 12 // every
    assert denoise_s(f"cache={every}", 1.0) == exactly(whole * FORWARD + (12 - whole) * cheap)
    skipped = "skip=" + ":".join(str(t) for t in range(12) if t % every)
    assert denoise_s(skipped, 1.0) == denoise_s(f"cache={every}", 1.0)


def several(graph: ScheduleGraph, requests: int) -> ScheduleGraph:
    """The same request again and again: buffers and op names of each apart, streams shared."""
    (section,) = graph.unroll().sections
    buffers, ops = [], []
    for q in range(requests):
        buffers += [replace(b, id=f"q{q}.{b.id}") for b in graph.buffers]
        for op in section.ops:
            reads, writes = (
                tuple(r._replace(buffer=f"q{q}.{r.buffer}") for r in refs)
                for refs in (op.reads, op.writes)
            )
            ops.append(replace(op, name=f"q{q}.{op.name}", reads=reads, writes=writes))
    return replace(graph, buffers=tuple(buffers), sections=(replace(section, ops=tuple(ops)),))


@pytest.mark.parametrize(("n", "inside"), [(2, ""), (4, ""), (2, "ulysses=2,")])
def test_step_pipeline(n: int, inside: str) -> None:
    """One request takes T forwards and n - 1 hops of X e; requests come out every T/n forwards.

    Streams of ten requests through the real engine; hops are hidden behind the next request's steps,
    so a period is the busiest rank's share, which is what the planner takes throughput from.
    """
    bandwidth, width = 5.0, 2 if inside else 1
    graph = build(
        parse_spec(f"{inside}streambatch={n}"), PLAIN, Workload(ROWS, WIDTH, 1, 12, 1, "fp16")
    )
    step = step_s(inside.strip(",") or "serial", bandwidth)
    topology = Topology.uniform(n * width, bandwidth_bytes_per_s=bandwidth)
    costs = CostModel(PLAIN, [load_gpu("unit")] * n * width, "fp16")
    one, nine, ten = (
        simulate(several(graph, q), topology, costs, periodic=False).makespan_s for q in (1, 9, 10)
    )
    assert one == exactly(12 * step + (n - 1) * X / bandwidth)
    assert ten - nine == exactly(12 * step / n)
    if not inside:
        busiest = max(share for _, share in attribute(simulate(graph, topology, costs)).utilisation)
        assert busiest * one == exactly(12 * step / n)


BOTH = (
    "cfg=2",
    "data=2",
    "patch=4",
    "patch=4,mode=naive",
    "distrifusion=4,warmup=1",
    "distrifusion=4,warmup=1,bucket=1",
    "distrifusion=4,warmup=1,bucket=3",
    "cfg=2,distrifusion=2,warmup=1",
    "pcpp=4,warmup=1",
    "pcpp=4,warmup=1,slice=sender",
    "asyncdiff=3,warmup=1",
    "asyncdiff=2,stride=2,warmup=1",
    "asyncdiff=2,stride=2,warmup=2",
    "cfg=2,asyncdiff=2,stride=2,warmup=2",
    "parastep=4,warmup=1",
    "cfg=2,parastep=2,warmup=1",
    "parastep=2,patch=2,warmup=1",
    "batchstep=3,warmup=1",
    "cfg=2,cache=3",
    "cfg=2,streambatch=2",
    "patch=4,weights=hsdp",
    "skip=2:3:7:8:9",
)
RATIO_CASES = [
    (toys.transformer(), spec)
    for spec in (
        *BOTH,
        "ulysses=4",
        "ring=4",
        "ring=4,rotate=allgather",
        "ulysses=2,ring=2",
        "pipefusion=4,patches=8",
        "pipefusion=4,patches=4",
        "pipefusion=2,patches=8,stages=1:3",
        "pipefusion=2,patches=8,prepost=false",
        "pipefusion=2,ulysses=2,patches=4",
        "cfg=2,pipefusion=2,ring=2,patches=2",
    )
]
RATIO_CASES += [
    (toys.divided(toys.transformer()), spec)
    for spec in ("tensor=4", "cfg=2,tensor=2,ulysses=2", "tensor=2,pipefusion=2,patches=4")
]
RATIO_CASES += [
    (toys.unet(3), spec)
    for spec in (
        *BOTH,
        "distrifusion=4,warmup=1,mode=stale_gn",
        "distrifusion=4,warmup=1,mode=sync_gn",
        "distrifusion=4,warmup=1,mode=separate_gn",
        "distrifusion=4,warmup=1,mode=no_sync",
        "distrifusion=4,mode=full_sync",
    )
]


@pytest.mark.parametrize("ratio", [0.98, 1.02, 1.1])
@pytest.mark.parametrize(
    ("profile", "spec"), RATIO_CASES, ids=[f"{p.name}-{s}" for p, s in RATIO_CASES]
)
def test_periodic_equals_unrolled(profile: Profile, spec: str, ratio: float) -> None:
    """Communication at ``ratio`` of compute, where lags grow for dozens of steps before they show.

    The bandwidth makes a rank's bytes of a steady step take ``ratio`` times its share of the forward.
    """
    steps = 60
    graph = build(parse_spec(spec), profile, Workload(ROWS, WIDTH, 1, steps, 1, "fp16"))
    share = profile.denoiser.flops({**SHAPE, "b": 2, "t": 6}) / graph.world_size
    bytes_a_step = max(graph.received_bytes().values()) / steps
    bandwidth = max(bytes_a_step, 1) / (ratio * share)
    folded = denoise_s(spec, bandwidth, steps, profile)
    assert folded == exactly(denoise_s(spec, bandwidth, steps, profile, periodic=False))
