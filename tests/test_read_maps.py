"""Every strategy: the read map of its rules, stated again by hand."""

from __future__ import annotations

import itertools

import pytest
from cases import CASES, DIT, UNET, WORKLOAD, graph_of

from paradiff.graph import Instance, ScheduleGraph
from paradiff.profiles import Profile
from paradiff.strategies import Workload, facts, parse_spec


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


@pytest.mark.parametrize(("profile", "spec"), CASES, ids=[f"{p.name}-{s}" for p, s in CASES])
def test_the_warm_up_told_is_that_of_the_graph(profile: Profile, spec: str) -> None:
    """``synchronous_steps`` of every strategy: the first step that reads behind itself, by the graph."""
    told = facts(parse_spec(spec), WORKLOAD)
    reads = graph_of(profile, spec).unroll().stale_reads()
    first = min((op.step for op, _, _ in reads if op.step is not None), default=WORKLOAD.steps)
    assert told.synchronous_steps == (WORKLOAD.steps if told.exact else first)


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


@pytest.mark.parametrize("rest", ["warmup=1", "warmup=2,stride=2", "warmup=1,stride=2"])
def test_asyncdiff_reads_the_same_in_each_branch(rest: str) -> None:
    """With twins for the other branch: the hidden states of the own branch and of the same steps; a
    scheduler step takes what both branches predicted in the step that it would take alone."""
    alone, mesh = (Reads(graph_of(DIT, f"{m}asyncdiff=3,{rest}")) for m in ("", "data=2,cfg=2,"))
    ranks = 4 if "stride" in rest else 3

    def of(lane: int, found: set[tuple[int, int]]) -> set[tuple[int, int]]:
        return {(place + lane * ranks, step) for place, step in found}

    for s, lane, place in itertools.product(range(9), range(4), range(ranks)):
        rank = lane * ranks + place
        assert mesh.of_step(rank, s, "hidden") == of(lane, alone.of_step(place, s, "hidden"))
        taken = alone.of_step(place, s, "noise", call="scheduler")
        both = of(lane, taken) | of(lane ^ 1, taken)
        assert mesh.of_step(rank, s, "noise", call="scheduler") == both, (s, rank)


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
