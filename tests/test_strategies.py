"""Every strategy: a valid graph, the read map of its rules, its byte formulas, its refusals."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiff.graph import Instance, ScheduleGraph, parse_graph
from paradiff.profiles import Profile
from paradiff.strategies import Facts, Infeasible, SpecError, Workload, build, facts, parse_spec

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


@pytest.mark.parametrize(("profile", "spec"), CASES, ids=IDS)
def test_graph_is_valid_round_trips_and_unrolls(profile: Profile, spec: str) -> None:
    graph = graph_of(profile, spec)

    graph.validate()

    assert graph.world_size == facts(parse_spec(spec), WORKLOAD).n_gpus
    assert parse_graph(graph.text()) == graph
    unrolled = graph.unroll()
    assert parse_graph(unrolled.text()) == unrolled
    assert graph.fingerprint() == unrolled.fingerprint()
    assert graph.op_count() == unrolled.op_count()
    assert graph.received_bytes() == unrolled.received_bytes()
    assert graph.staleness() == unrolled.staleness()
    assert graph.peak_bytes() == unrolled.peak_bytes()


SHARED = [
    (p, s)
    for p, s in CASES
    if not any(
        each in s for each in ("asyncdiff", "parastep", "batchstep", "data", "ring", "cache")
    )
]


@pytest.mark.parametrize(("profile", "spec"), SHARED, ids=[f"{p.name}-{s}" for p, s in SHARED])
def test_every_segment_is_computed_once_a_step(profile: Profile, spec: str) -> None:
    """Rows x segments summed over the ranks that share a forward make one whole forward.

    Not where ranks repeat a forward (step strategies, data) or attend block by block (ring).
    """
    rows: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for op, base in graph_of(profile, spec).instances():
        if op.work is None or op.work.stage != "denoiser" or op.step is None:
            continue
        for lo, hi in op.work.ranges:
            for segment in range(lo, hi):
                shape = op.work.shape
                rows[op.step + base, segment] += Fraction(shape.r * shape.b, shape.u * shape.p)

    segments, branches = len(profile.denoiser.segments), 2
    assert rows == {(t, s): 16 * branches for t in range(9) for s in range(segments)}


# ------------------------------------------------------------------------------------- read maps


class Reads:
    """Who computed what an op reads: transfers are followed to the computation behind them."""

    def __init__(self, graph: ScheduleGraph) -> None:
        self.kinds = {b.id: b.kind for b in graph.buffers}
        self.writer: dict[str, Instance] = {}
        self.sources: dict[str, set[tuple[str, str]]] = {}
        self.ops: dict[str, Instance] = {}
        for instance in graph.instances():
            found: set[tuple[str, str]] = set()
            for ref in instance.op.reads:
                kind = self.kinds[ref.buffer]
                before = self.writer.get(ref.show(instance.base))
                if before is None:
                    continue
                if before.op.kind == "compute":
                    found.add((kind, before.id))
                else:
                    found |= {(kind, source) for _, source in self.sources[before.id]}
            self.sources[instance.id] = found
            self.ops[instance.id] = instance
            for ref in instance.op.writes:
                self.writer[ref.show(instance.base)] = instance

    def of_step(
        self, rank: int, step: int, *kinds: str, call: str = "forward"
    ) -> set[tuple[int, int]]:
        """(rank, step) of the computations whose ``kinds`` the given rank's calls of a step read."""
        found = set()
        for op_id, (op, base) in self.ops.items():
            if op.call != call or op.ranks != (rank,) or op.step is None or op.step + base != step:
                continue
            for kind, source in self.sources[op_id]:
                other, origin = self.ops[source]
                if kind in kinds and other.step is not None:
                    found.add((other.ranks[0], other.step + origin))
        return found


@pytest.mark.parametrize("profile", [DIT, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize("bucket", [1, 2, 60])
def test_distrifusion_reads_others_one_step_old(profile: Profile, bucket: int) -> None:
    """w = 2: steps 0..2 read all strips fresh; later steps read the others of the step before."""
    reads = Reads(graph_of(profile, f"distrifusion=4,warmup=2,bucket={bucket}"))
    kinds = ("slots", "kv", "halo", "moments")

    for t in range(9):
        for i in range(4):
            others = {(j, t if t <= 2 else t - 1) for j in range(4) if j != i}
            own = {(i, t), (i, t - 1)}
            assert reads.of_step(i, t, *kinds) - own == others, (t, i)


def test_distrifusion_no_sync_stays_at_the_warm_up() -> None:
    """Buffers are frozen at step w = 1: at step t they are t - 1 steps old, at the end 7."""
    graph = graph_of(UNET, "distrifusion=4,warmup=1,mode=no_sync")
    reads = Reads(graph)

    assert {j for j, t in reads.of_step(2, 8, "slots")} == {0, 1, 2, 3}
    assert {t for _, t in reads.of_step(2, 8, "slots")} == {1}
    assert graph.staleness() == 8 - 1


def test_pcpp_reads_adjacent_strips_only() -> None:
    reads = Reads(graph_of(DIT, "pcpp=4,warmup=1"))

    for t in range(3, 9):
        for i in range(4):
            near = {(j, t - 1) for j in (i - 1, i + 1) if 0 <= j < 4}
            # a swap carries both ways, so its own side shows too; (j, t) is the wait before sending
            besides = {(j, t) for j, _ in near} | {(i, t), (i, t - 1)}
            assert reads.of_step(i, t, "kv") - besides == near, (t, i)


def test_pcpp_sees_a_portion_of_its_neighbours() -> None:
    """Strips of 4 rows, portion 0.5: 4 + 2 rows of keys at an end, 4 + 2 + 2 inside."""
    graph = graph_of(DIT, "pcpp=4,warmup=1,portion=0.5")
    keys = {
        (op.ranks[0], op.work.shape.k)
        for op, base in graph.instances()
        if op.work and op.work.stage == "denoiser" and op.step is not None and op.step + base > 1
    }
    assert keys == {(0, 6), (1, 8), (2, 8), (3, 6)}


@pytest.mark.parametrize(("stages", "patches"), [(2, 4), (4, 4), (4, 8), (2, 1)])
def test_pipefusion_reads_patches_before_it_fresh_and_after_it_stale(
    stages: int, patches: int
) -> None:
    """K,V[q]@t for q < p and K,V[q]@(t-1) for q > p, whatever the number of stages."""
    graph = graph_of(DIT, f"pipefusion={stages},patches={patches},warmup=2")

    for op, base in graph.instances():
        if op.call != "forward" or base < 2 or op.step is None:
            continue
        p = int(op.name.split("/p")[1].split("/")[0])
        cache = {r.part: r.at(base) for r in op.reads if r.buffer.startswith("cache")}
        assert cache == {q: base if q < p else base - 1 for q in range(patches) if q != p}
        assert [r.part for r in op.writes if r.buffer.startswith("cache")] == [p]
    assert graph.staleness() == (1 if patches > 1 else 0)


def test_pipefusion_with_ulysses_reads_the_same_versions() -> None:
    """Section 15: the result depends on M and w only, so the cache versions read are the same."""

    def versions(spec: str) -> set[tuple[int, int, int | None, int]]:
        found = set()
        for op, base in graph_of(DIT, spec).instances():
            for ref in op.reads:
                if ref.buffer.startswith("cache"):
                    patch = int(op.name.split("/p")[1].split("/")[0])
                    found.add((base, patch, ref.part, ref.at(base)))
        return found

    alone = versions("pipefusion=2,patches=2,warmup=1")
    assert alone == versions("pipefusion=2,ulysses=2,patches=2,warmup=1")
    assert alone == versions("cfg=2,pipefusion=2,ring=2,patches=2,warmup=1")


def test_asyncdiff_stride_1_reads_other_components_one_step_old() -> None:
    """O_i@s = f_i(O_{i-1}@(s-1)): three components, w = 1, from step 1 on."""
    reads = Reads(graph_of(DIT, "asyncdiff=3,warmup=1"))

    for s in range(1, 9):
        for c in range(3):
            # a chain of blocks broadcasts the outputs of components 0 and 1 only
            assert reads.of_step(c, s, "hidden") == {(0, s - 1), (1, s - 1)}, (s, c)
        assert reads.of_step(0, s, "noise", call="scheduler") == {(2, s)}


def test_asyncdiff_stride_2_example_b() -> None:
    """Section 13.8 example B, N = 2, w = 1, T = 5: rounds at 1 and 3, replays at 2 and 4."""
    reads = Reads(graph_of(DIT, "asyncdiff=2,stride=2,warmup=1", Workload(16, 4, 1, 5)))

    for rank in range(3):
        assert {t for _, t in reads.of_step(rank, 1, "hidden")} == {0}
        assert reads.of_step(rank, 3, "hidden") == {(0, 1)}
        assert reads.of_step(rank, 1, "noise", call="scheduler") == {(2, 1)}
        assert reads.of_step(rank, 2, "noise", call="scheduler") == {(1, 1)}
        assert reads.of_step(rank, 3, "noise", call="scheduler") == {(2, 3)}
        assert reads.of_step(rank, 4, "noise", call="scheduler") == {(1, 3)}


def test_asyncdiff_stride_2_with_even_warm_up_replays_first() -> None:
    """Section 13.2: network calls at odd steps; with w = 2 step 2 replays the last warm-up step."""
    reads = Reads(graph_of(DIT, "asyncdiff=2,stride=2,warmup=2", Workload(16, 4, 1, 7)))

    for rank in range(3):
        assert reads.of_step(rank, 2, "noise", call="scheduler") == {(rank, 1)}
        assert reads.of_step(rank, 3, "hidden") == {(0, 1)}
        assert reads.of_step(rank, 3, "noise", call="scheduler") == {(2, 3)}
        assert reads.of_step(rank, 4, "noise", call="scheduler") == {(1, 3)}
        assert reads.of_step(rank, 5, "hidden") == {(0, 3)}
        assert reads.of_step(rank, 6, "noise", call="scheduler") == {(1, 5)}


@pytest.mark.parametrize(("p", "w"), [(2, 1), (4, 2), (3, 5), (4, 7), (2, 8)])
def test_parastep_reuses_its_own_noise_until_its_turn(p: int, w: int) -> None:
    """Section 14.2 by direct statement: own[k] is what rank k last evaluated, or its warm-up."""
    reads = Reads(graph_of(DIT, f"parastep={p},warmup={w}"))
    own = {k: (k, w - 1) for k in range(p)}

    for t in range(9):
        if t < w:
            assert all(reads.of_step(k, t, "noise", call="scheduler") == {(k, t)} for k in own)
            continue
        turn = (t - w) % p
        own[turn] = (turn, t)
        for k in range(p):
            expected = own[turn] if k == 0 else own[k]
            assert reads.of_step(k, t, "noise", call="scheduler") == {expected}, (t, k)


@pytest.mark.parametrize("inside", ["cfg=2", "ulysses=2", "patch=4", "cfg=2,ring=2", "data=2"])
def test_parastep_reads_the_same_over_any_pass(inside: str) -> None:
    """Each rank of group k steps with what a lone rank k would (section 15: a pass is a device)."""
    alone = Reads(graph_of(DIT, "parastep=2,warmup=2"))
    graph = graph_of(DIT, f"parastep=2,{inside},warmup=2")
    within, reads = graph.world_size // 2, Reads(graph)
    groups = within if "data" not in inside else 1

    for rank, t in itertools.product(range(graph.world_size), range(9)):
        found = reads.of_step(rank, t, "noise", call="scheduler")
        expected = alone.of_step(rank // groups % 2, t, "noise", call="scheduler")
        assert {(r // groups % 2, s) for r, s in found} == expected, (rank, t)


@pytest.mark.parametrize(("p", "w"), [(2, 1), (4, 2), (3, 5), (4, 7)])
def test_batchstep_reads_what_parasteps_ranks_read(p: int, w: int) -> None:
    """Entry k of the batch is rank k: step by step it reads noise predicted at the same step."""

    def ages(spec: str) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for op, base in graph_of(DIT, spec).instances():
            if op.call != "scheduler" or op.step is None:
                continue
            k = op.writes[0].part if "batch" in spec else op.ranks[0]
            eps = next(r for r in op.reads if r.buffer.startswith("eps"))
            found[k, op.step + base] = eps.at(base)
        return found

    batch, ranks = ages(f"batchstep={p},warmup={w}"), ages(f"parastep={p},warmup={w}")
    last = 9 - (9 - w) % p  # in a last cycle that is not full, only the first latent matters
    for (k, t), step in batch.items():
        if t < last or k == 0:
            assert step == ranks[k, t], (k, t)
    assert {(k, t) for k, t in batch if t < last} == {(k, t) for k, t in ranks if t < last}


def test_what_a_cached_step_holds() -> None:
    """The hidden state after the last block but one, b (s/n + text) h e; 6 words are on each of 4."""
    for spec, words in (("cache=2", 6), ("ulysses=2,cache=2", 3), ("ulysses=4,cache=2", 6)):
        n = parse_spec(spec).n_gpus
        graph = graph_of(JOINT, spec)
        sizes = {b.nbytes for b in graph.buffers if b.id.startswith("cache.")}
        assert sizes == {2 * (TOKENS // n + words) * HIDDEN * ELEMENT}


@pytest.mark.parametrize("profile", [DIT, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize(
    ("spec", "reused"), [("cache=3", {1, 2, 4, 5, 7, 8}), ("skip=2:3:8", {2, 3, 8})]
)
def test_reusing_steps_read_the_last_whole_one(
    profile: Profile, spec: str, reused: set[int]
) -> None:
    """Of 9 steps; a reuse is as old as the last step that was computed whole."""
    graph = graph_of(profile, f"cfg=2,{spec}")
    reads, ages = Reads(graph), []
    for t in range(9):
        last = max(s for s in range(t + 1) if s not in reused)
        ages.append(t - last)
        for rank in range(2):
            expected = {(rank, last)} if t in reused else set()
            assert reads.of_step(rank, t, "hidden") == expected, (t, rank)
    assert graph.staleness() == max(ages)
    known = facts(parse_spec(spec), WORKLOAD)
    assert not known.exact
    assert facts(parse_spec("cache=1"), WORKLOAD).exact


def test_exact_strategies_read_nothing_old() -> None:
    for profile, spec in CASES:
        if facts(parse_spec(spec), WORKLOAD).exact or "naive" in spec:
            assert graph_of(profile, spec).staleness() == 0, spec


# ------------------------------------------------------------------------------------- bytes

TOKENS, HIDDEN, BLOCKS, ELEMENT, STEPS = 64, 8, 4, 2, 9
LATENT = 4 * 16 * 4 * ELEMENT  # one latent X: channels x rows x columns


def received(spec: str, call: str, profile: Profile = DIT) -> float:
    """Bytes that rank 0 receives in one step by ``call``, the whole run divided by its steps."""
    return graph_of(profile, spec).bytes_by_call()[0].get(call, (0, 0))[1] / STEPS


@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_bytes(n: int) -> None:
    """4 exchanges a layer, each (n-1)/n of b (s/n) h e (section 5.3); b = 2 with guidance."""
    assert received(f"ulysses={n}", "all_to_all") == BLOCKS * 4 * (n - 1) / n * (
        2 * TOKENS // n * HIDDEN * ELEMENT
    )
    assert received(f"ulysses={n}", "all_gather") == (n - 1) * 2 * LATENT // n


@pytest.mark.parametrize("n", [2, 4, 8])
def test_ring_bytes(n: int) -> None:
    """2 b (s/n) h e (n-1) a layer, by P2P or by one all-gather (section 6.3)."""
    wanted = BLOCKS * 2 * 2 * TOKENS // n * HIDDEN * ELEMENT * (n - 1)
    assert received(f"ring={n}", "ring") == wanted
    gathered = received(f"ring={n},rotate=allgather", "all_gather")
    assert gathered - (n - 1) * 2 * LATENT // n == wanted


def test_usp_bytes() -> None:
    """4(u-1)/u b (s/n) h e + 2(r-1) b (s/n) h e a layer (section 7.3), u = r = 2."""
    share = 2 * TOKENS // 4 * HIDDEN * ELEMENT
    assert received("ulysses=2,ring=2", "all_to_all") == BLOCKS * 4 * share / 2
    assert received("ulysses=2,ring=2", "ring") == BLOCKS * 2 * share


def test_tensor_ranks_are_the_fastest_axis() -> None:
    """Mesh order tp, sp, pp, cfg (section 15): each sum is between neighbours, and every other exchange
    between ranks with the same share of the weights."""
    graph = graph_of(DIVIDED, "cfg=2,tensor=2,pipefusion=2,ulysses=2,patches=2")
    ops = {o.name: o for o in graph.sections[1].ops if len(o.ranks) > 1}.values()
    groups = {(o.call, o.ranks) for o in ops}
    assert {g for call, g in groups if call == "all_reduce"} == {
        (r, r + 1) for r in range(0, 16, 2)
    }
    assert ("all_to_all", (0, 2)) in groups
    assert ("send", (0, 4)) in groups
    assert ("all_gather", (4, 12)) in groups
    assert all(len({r % 2 for r in g}) == 1 for call, g in groups if call != "all_reduce")


def test_joint_text_is_split_or_gathered() -> None:
    """6 text tokens: 2 ranks split them (3 each); 4 ranks replicate and gather their heads."""
    split = 2 * (TOKENS + 6) // 2 * HIDDEN * ELEMENT
    assert received("ulysses=2", "all_to_all", JOINT) == BLOCKS * 4 * split / 2
    image = 2 * TOKENS // 4 * HIDDEN * ELEMENT
    heads = 2 * 6 * HIDDEN // 4 * ELEMENT
    assert received("ulysses=4", "all_to_all", JOINT) == BLOCKS * 4 * image * 3 / 4
    gathered = received("ulysses=4", "all_gather", JOINT) - 3 * 2 * LATENT // 4
    assert gathered == BLOCKS * 3 * heads


def test_cfg_bytes() -> None:
    """Each branch sends its prediction X e to its twin (section 2.3)."""
    assert received("cfg=2", "all_gather") == LATENT


def test_distrifusion_bytes_and_buffers() -> None:
    """(n-1) e sum(published) a step; gathered buffers n e sum (sections 10.3, 10.4).

    U-Net, b = 2, n = 4, e = 2: K/V 16 b (r/4) w = 512, halo 16 b w = 128 elements a layer and one
    for conv_out, moments 4 b = 8 numbers of 4 bytes; 3 layers.
    """
    published = 3 * (512 * 2 + 128 * 2 + 8 * 4) + 128 * 2
    graph = graph_of(UNET, "distrifusion=4,warmup=0,bucket=2")
    buckets = [
        op.nbytes for op, _ in graph.instances() if op.name.startswith("bucket") and op.nbytes
    ]
    # 10 tensors in buckets of 2: none deferred; 8 steps send all of them
    assert sum(buckets) == 8 * published
    assert graph.peak_bytes(["slots"])[0] == 4 * published


def test_pcpp_saves_70_percent() -> None:
    """Interior strip: 2 portion / (n-1) of DistriFusion's K/V with sender slicing (section 11.3)."""
    size = 2 * 16 * 4 * 4 * ELEMENT  # K,V of one strip: 16 b r w with b = 2, r = 4, w = 4
    graph = graph_of(DIT, "pcpp=4,warmup=0,slice=sender,portion=0.3")
    inside = graph.bytes_by_call()[1]["exchange"][1]
    assert inside == 8 * BLOCKS * 2 * round(size * 0.3)


@pytest.mark.parametrize("patches", [2, 4])
def test_pipefusion_bytes_and_cache(patches: int) -> None:
    """Forward link g B s h e a step whatever M, loop link X e; cache 2 (L/N) g B s h e (12.3, 12.4)."""
    graph = graph_of(DIT, f"pipefusion=2,patches={patches}")
    sent = graph.bytes_by_call()
    assert sent[1]["send"][1] == STEPS * 2 * TOKENS * HIDDEN * ELEMENT
    assert sent[0]["send"][1] == (STEPS - 1) * LATENT
    assert graph.peak_bytes(["kv"]) == dict.fromkeys((0, 1), 2 * 2 * 2 * TOKENS * HIDDEN * ELEMENT)


@pytest.mark.parametrize("patches", [1, 4])
@pytest.mark.parametrize(
    ("counts", "blocks"),
    [
        ("3:3", {(0, 1): 2}),
        ("2:2:2", {(0, 2): 2}),
        ("1:1:2:1:1", {(0, 4): 1, (1, 3): 1}),
        ("1:4:1", {(0, 2): 1}),  # from block 1 to block 4: inside stage 1
        ("2:4", {(0, 1): 1}),  # from block 1 on: it is the hidden state that stage 1 gets
        ("5:1", {(0, 1): 1}),
    ],
)
def test_skips_go_from_the_stage_that_makes_them_to_the_one_that_uses_them(
    counts: str, blocks: dict[tuple[int, int], int], patches: int
) -> None:
    """g B s h e a step for each skip that crosses stages, whatever M, in M messages of all that go the
    same way, on channels of their own (section 12.2). Skips go from block 0 to 5 and from 1 to 4."""
    graph = graph_of(SKIPS, f"pipefusion={len(counts) // 2 + 1},patches={patches},stages={counts}")
    sent: dict[tuple[int, ...], int] = defaultdict(int)
    messages: dict[tuple[int, ...], int] = defaultdict(int)
    for op, _ in graph.instances():
        if op.stream.startswith("skip."):
            sent[op.ranks] += op.nbytes
            messages[op.ranks] += 1
    assert sent == {ends: STEPS * n * 2 * TOKENS * HIDDEN * ELEMENT for ends, n in blocks.items()}
    assert messages == dict.fromkeys(blocks, 1 + (STEPS - 1) * patches)


def test_asyncdiff_broadcasts_what_skips_over_a_boundary() -> None:
    """Blocks 0 1 | 2 3 | 4 5: the hidden states after 1 and 3, and of the skips 0 to 5 and 1 to 4 the
    first; the second is the hidden state after 1."""
    graph = graph_of(SKIPS, "asyncdiff=3,warmup=1,cuts=2:4")
    names = {op.name.split("@")[0] for op, _ in graph.instances() if "bcast" in op.name}
    assert names == {"bcast.block0", "bcast.block1", "bcast.block3", "bcast.eps"}


def test_ring_inside_pipefusion_pays_once_a_patch() -> None:
    """The ring turns the whole local cache in every micro-step (section 15.2)."""
    whole = graph_of(DIT, "pipefusion=2,ring=2,patches=1,warmup=1").bytes_by_call()[0]["ring"][1]
    cut = graph_of(DIT, "pipefusion=2,ring=2,patches=4,warmup=1").bytes_by_call()[0]["ring"][1]
    assert cut == whole / STEPS * (1 + 8 * 4)


def test_parastep_bytes() -> None:
    """A cycle of p: (p-1) g X e into rank 0 and one latent broadcast to the others (14.3)."""
    sent = graph_of(DIT, "parastep=4,warmup=1").bytes_by_call()
    assert sent[0]["send"][1] == 2 * 3 * 2 * LATENT
    assert sent[3]["broadcast"][1] == 2 * LATENT


def test_asyncdiff_unet_broadcasts_whole_blocks_where_it_can() -> None:
    """Owners 0 0 0 | 0 1 ...: a block inside one component sends its tuple, a cut one its parts."""
    graph = graph_of(UNET, "asyncdiff=2,warmup=1,cuts=4")
    size = 2 * 16 * 4 * ELEMENT
    sizes = {op.name.split("@")[0]: op.nbytes for op, _ in graph.instances() if "bcast" in op.name}
    assert sizes == {
        "bcast.conv_in": 8 * size,
        "bcast.down.0": 24 * size,
        "bcast.down.1.0": 8 * size,
        "bcast.down.1.1": 8 * size,
        "bcast.down.2": 24 * size,
        "bcast.conv_out": 4 * size,
        "bcast.eps": 2 * LATENT,
    }


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not name=value"),
        ("ulysses", "not name=value"),
        ("ulysses=x", "whole number"),
        ("ulysses=0", "at least 1"),
        ("warp=4", "unknown 'warp'"),
        ("distrifusion=4,patches=2", "unknown 'patches'"),
        ("distrifusion=4,mode=fast", "mode=fast"),
        ("distrifusion=2,pipefusion=2", "both decide"),
        ("cfg=2,cfg=2", "twice"),
        ("rotate=p2p", "unknown 'rotate'"),
        ("serial=4", "serial=4"),
        ("parastep=2,distrifusion=2", "both decide"),
        ("parastep=2,patch=2,pipefusion=2", "both decide"),
        ("batchstep=2,patch=2", "both decide"),
        ("patch=2,cache=2", "unknown 'cache'"),
        ("cache=0", "at least 1"),
        ("offload=gpu", "expected text"),
        ("weights=int4", "weights=int4; expected fp8"),
        ("skip=a", "counts such as"),
        ("patch=\u0663", "whole number"),
        ("pcpp=2,portion=0.0", "portion=0.0"),
        ("pcpp=2,mode=no_sync", "mode=no_sync"),
        ("pcpp=4,portion=1.5", "portion=1.5"),
        ("asyncdiff=2,stride=3", "stride=3"),
    ],
)
def test_malformed_spec_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says.replace("(", r"\(")):
        parse_spec(text)


@pytest.mark.parametrize(
    ("profile", "spec", "reason", "nearest"),
    [
        (DIT, "ulysses=3", "4 heads", "ulysses=2 or ulysses=4"),
        (DIT, "ring=5", "16 token rows", "ring=4"),
        (UNET, "ulysses=2", "U-Net", "patch=2"),
        (UNET, "pipefusion=2", "U-Net", "distrifusion=2"),
        (UNET, "distrifusion=3", "16 latent rows", "distrifusion=2"),
        (DIT, "cfg=3", "two branches", "cfg=2"),
        (DIT, "pipefusion=5", "4 blocks", "pipefusion=4"),
        (DIT, "pipefusion=2,stages=1:2", "sum to 4", "stages=2:2"),
        (DIT, "pipefusion=2,ulysses=4,stages=balanced,patches=5", "at most 4 patches", "patches=4"),
        (DIT, "pipefusion=2,ring=3", "16 token rows", "ring=2"),
        (DIT, "pipefusion=2,patches=17", "at most 16 patches", "patches=16"),
        (DIT, "pipefusion=2,warmup=0", "at least one", "warmup=1"),
        (DIT, "asyncdiff=5,warmup=1", "between 2 and 4", "asyncdiff=4"),
        (DIT, "asyncdiff=2,warmup=1,cuts=9", "rising block numbers", "cuts=2"),
        (DIT, "parastep=4,warmup=10", "at least one of the 9 steps", "warmup=9"),
        (DIT, "skip=0:3", "nothing to reuse", "cache=2"),
        (DIT, "skip=9", "between 1 and 8", "cache=2"),
        (replace(DIT, skips=((0, 3),)), "cache=2", "skip connections", "serial"),
        (toys.transformer(1), "cache=2", "too few blocks", "serial"),
        (DIT, "streambatch=10", "between 2 and 9", "streambatch=9"),
        (DIT, "batchstep=1", "every step waits", "batchstep=2"),
        (DIT, "parastep=2,ulysses=3", "4 heads", "ulysses=2 or ulysses=4"),
        (DIT, "batchstep=2,cfg=2", "runs alone", "batchstep=2"),
        (UNET, "pipefusion=5", "U-Net", "distrifusion=4"),
        (UNET, "ulysses=7", "U-Net", "patch=4"),
        (DIT, "distrifusion=2,ulysses=2", "runs alone", "distrifusion=2"),
        (DIVIDED, "tensor=3", "4 attention heads .* do not divide by 3", "tensor=2 or tensor=4"),
        (DIVIDED, "tensor=8", "4 attention heads", "tensor=4"),
        (UNET, "tensor=4", "2 groups of a GroupNorm", "tensor=2"),
        (DIT, "tensor=2", "does not say how its weights are divided", "tensor=1"),
        (DIVIDED, "tensor=2,ulysses=4", "2 heads .* on each of 2", "ulysses=2"),
        (DIVIDED, "distrifusion=2,tensor=2", "runs alone", "distrifusion=2"),
    ],
)
def test_infeasible_names_the_reason_and_the_nearest(
    profile: Profile, spec: str, reason: str, nearest: str
) -> None:
    with pytest.raises(Infeasible, match=reason) as caught:
        graph_of(profile, spec)
    assert caught.value.nearest == nearest


def refusal(profile: Profile, spec: str) -> Infeasible | None:
    try:
        graph_of(profile, spec)
    except Infeasible as error:
        return error
    return None


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    profile=st.sampled_from([DIT, JOINT, UNET, DIVIDED]),
    spec=st.one_of(
        st.tuples(
            st.sampled_from(
                ["patch", "distrifusion", "pcpp", "pipefusion", "asyncdiff", "ring", "tensor"]
            ),
            st.integers(2, 19),
        ).map(lambda pair: f"{pair[0]}={pair[1]}"),
        st.tuples(st.integers(1, 9), st.integers(1, 9)).map(
            lambda pair: f"ulysses={pair[0]},ring={pair[1]}"
        ),
        st.tuples(st.integers(2, 4), st.integers(1, 40), st.integers(0, 30)).map(
            lambda each: f"pipefusion={each[0]},patches={each[1]},warmup={each[2]}"
        ),
    ),
)
def test_every_nearest_is_legal(profile: Profile, spec: str) -> None:
    """What is offered instead, alone or in place of the refused keys, is built or refused for more."""
    for _ in range(4):
        refused = refusal(profile, spec)
        if refused is None:
            return
        assert refused.nearest, (spec, str(refused))
        instead = refused.nearest.split(" or ")[0]
        given = dict(part.split("=") for part in spec.split(","))
        offered = dict(part.partition("=")[::2] for part in instead.split(","))
        replaced: set[str] = set()
        if {"ulysses", "ring"} & set(offered):
            replaced = {"ulysses", "ring"}
        if {"serial", "patch", "distrifusion"} & set(offered):
            replaced = set(given)
        merged = {k: v for k, v in given.items() if k not in replaced} | offered
        assert merged != given, spec
        spec = ",".join(f"{k}={v or 1}" for k, v in merged.items())
    raise AssertionError(f"no legal spec after four offers: {spec}")


def test_warm_up_beyond_the_steps_is_all_synchronous() -> None:
    """Three steps with the default warm-up of four: every step is synchronous, as in the reference."""
    short = Workload(16, 4, 1, 3)
    graph = graph_of(UNET, "distrifusion=4", short)
    assert graph.staleness() == 0
    assert facts(parse_spec("distrifusion=4"), short) == Facts(4, 3, True)


def test_facts_know_the_conventions() -> None:
    """w + 1 synchronous steps for DistriFusion and PCPP, w elsewhere (section 0.6)."""

    def of(spec: str) -> tuple[int, int, bool]:
        f = facts(parse_spec(spec), WORKLOAD)
        return f.n_gpus, f.synchronous_steps, f.exact

    assert of("cfg=2,distrifusion=4,warmup=4") == (8, 5, False)
    assert of("distrifusion=4,warmup=8") == (4, 9, True)
    assert of("pipefusion=4,warmup=1") == (4, 1, False)
    assert of("pipefusion=4,patches=1") == (4, 1, True)
    assert of("asyncdiff=3,stride=2,warmup=3") == (4, 3, False)
    assert of("parastep=4,warmup=8") == (4, 8, True)
    assert of("data=2,cfg=2,ulysses=2") == (8, 9, True)
    assert of("patch=4,mode=naive") == (4, 9, False)
