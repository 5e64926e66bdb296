"""Where weights live: loads, shards and fp8 in closed form, and what each leaves of the memory."""

from __future__ import annotations

import pytest
import toys
from shipped import profile as model
from test_closed_forms import BLOCKS, ELEMENT, PLAIN, ROWS, SHAPE, WIDTH, X, denoise_s, exactly

from paradiff.dependencies import validate
from paradiff.strategies import Infeasible, Workload, build, facts, parse_spec
from simulator.costs import CostModel
from simulator.engine import simulate
from simulator.gpu import load_gpu
from simulator.memory import RankMemory, at_peak, phase_memory
from simulator.network import HOST, Network
from simulator.topology import Link, Node, Topology, load_topology

TOY = Workload(ROWS, WIDTH, 1, 6, 1, "fp16")
DIT = toys.transformer()
LOOP = ("denoiser", "scheduler", "guidance")


def box(gpus: int, memory: float, link: float) -> Topology:
    """``gpus`` on one switch that host memory hangs on."""
    names = tuple(f"gpu{i}" for i in range(gpus))
    return Topology(
        name="host",
        gpus=names,
        profiles=("unit",) * gpus,
        nodes=(Node(name="host0", gpus=names, host_memory_bytes_per_s=memory, memory_at=("rc0",)),),
        switches=("rc0",),
        links=tuple(Link(a=n, b="rc0", bandwidth_bytes_per_s=link, kind="pcie") for n in names),
    )


def run_s(spec: str, topology: Topology) -> float:
    graph = build(parse_spec(spec), DIT, TOY)
    validate(graph)
    costs = CostModel(DIT, [load_gpu("unit")] * graph.world_size, "fp16")
    return simulate(graph, topology, costs).makespan_s


def peaks(spec: str, name: str = "flux1-dev") -> tuple[RankMemory, ...]:
    profile = model(name)
    w = profile.defaults
    workload = Workload(w["height"], w["width"], w["frames"], 4, 1, "bf16")
    return at_peak(phase_memory(build(parse_spec(spec), profile, workload), profile, "bf16"))


# -------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize(
    ("offload", "loaded"),
    [
        ("text", ("text_encoder", *LOOP, "vae")),
        ("text+vae", ("text_encoder", *LOOP, "vae")),
        ("vae", (*LOOP, "vae")),
    ],
)
def test_offload_adds_the_loads_of_a_request(offload: str, loaded: tuple[str, ...]) -> None:
    """Each module whose turn comes crosses the link once; nothing else changes. With ``vae`` alone the
    denoiser loads while the text encoder, which stays, works."""
    rate = 4.0
    seconds = ELEMENT * sum(DIT.stages[name].params for name in loaded) / rate
    if offload == "vae":
        seconds -= DIT.stages["text_encoder"].flops({**SHAPE, "b": 2, "t": 6})
    topology = box(1, float("inf"), rate)
    alone = run_s("serial", topology)
    assert run_s(f"serial,offload={offload}", topology) == exactly(alone + seconds)


def test_a_sharded_denoiser_loads_its_shards() -> None:
    """Ulysses over 2, 4 blocks of 192 parameters: half of them, embedding and head (16 each) whole."""

    def loads(spec: str) -> dict[str, int]:
        graph = build(parse_spec(spec), DIT, TOY)
        validate(graph)
        return {op.name: op.nbytes for s in graph.sections for op in s.ops if op.call == "load"}

    rest = sum(DIT.stages[name].params for name in ("scheduler", "guidance"))
    whole = loads("ulysses=2,offload=vae")["load.denoiser@r0"]
    assert whole == ELEMENT * (DIT.denoiser.params + rest)
    shared = loads("ulysses=2,offload=vae,weights=hsdp")
    assert shared["load.denoiser@r1"] == ELEMENT * (4 * 192 // 2 + 2 * 16 + rest)


def test_gpus_share_their_host_memory() -> None:
    """Four replicas load at once: a quarter of 4 B/s each, though each link has 4 B/s."""
    one = run_s("serial,offload=text", box(1, 4.0, 4.0)) - run_s("serial", box(1, 4.0, 4.0))
    four = run_s("data=4,offload=text", box(4, 4.0, 4.0)) - run_s("data=4", box(4, 4.0, 4.0))
    assert four == exactly(4 * one)


def test_routes_from_host_memory() -> None:
    """pcie8: its own link for one GPU, for all at once at most an eighth of host memory each; without a
    word on what memory hangs on, PCIe 4 x16."""
    box = load_topology("pcie8")
    network = Network(box)
    routes = tuple(network.route(HOST, d).id for d in range(8))
    link = next(k.bandwidth_bytes_per_s for k in box.links if "gpu0" in (k.a, k.b))
    (node,) = box.nodes
    assert network.rates(routes[:1]) == (link,)
    assert network.rates(routes) == pytest.approx(
        (min(link, node.host_memory_bytes_per_s / 8),) * 8
    )
    plain = Network(Topology.uniform(2))
    assert plain.rates((plain.route(HOST, 1).id,)) == (26e9,)


def test_turns_peak_where_the_largest_module_is() -> None:
    """flux1-dev: T5 and CLIP 9.8 GB, denoiser 23.8 GB: with turns they never meet."""
    (all_there,), (turns,) = peaks("serial"), peaks("serial,offload=text+vae")
    assert (turns.phase, turns.text_encoders, turns.vae) == ("denoise", 0, 0)
    assert turns.weights == all_there.weights
    assert turns.total < 24.5 * 2**30 < 33 * 2**30 < all_there.total
    assert peaks("serial,offload=text")[0].vae == all_there.vae > 0


# ------------------------------------------------------------------------------------------ sharding


def naive_block_s(n: int) -> float:
    """One block on a strip that sees only itself."""
    shape = {**SHAPE, "r": ROWS // n, "k": ROWS // n}
    return PLAIN.denoiser.flops(shape) / BLOCKS


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("pace", [0.2, 4.0])
def test_sharded_step(n: int, pace: float) -> None:
    """Gathers of B bytes a block, an output gather of A > 2 B bytes; blocks compute tau each.

    Gathers shorter than tau: all hidden, but for the one of block 1, which waits for the last block to
    free its buffer and then shares the link with the output: L tau + (A + B) / bandwidth. Gathers
    longer than tau: the link rests only while block 0 computes, as the gathers of blocks 0 and 1 are
    done before the output is, and that of block 2 waits for block 0: (L B + A) / bandwidth + tau.
    """
    tau = naive_block_s(n)
    weights = (64 + 128) * ELEMENT
    gather, output = (n - 1) * weights / n, (n - 1) * X / n
    bandwidth = gather / (pace * tau)
    spec = f"patch={n},mode=naive,weights=hsdp"
    short, long = (denoise_s(spec, bandwidth, t, periodic=False) for t in (5, 15))
    hidden = BLOCKS * tau + (output + gather) / bandwidth
    paced = (BLOCKS * gather + output) / bandwidth + tau
    assert (long - short) / 10 == exactly(hidden if pace < 1 else paced)


@pytest.mark.parametrize("spec", ["ulysses=8", "cfg=2,ulysses=4", "pipefusion=2,ulysses=4"])
def test_sharded_weights_in_closed_form(spec: str) -> None:
    """A share of the blocks, the rest whole, and two gathered blocks."""
    profile = model("pixart-alpha")
    width = parse_spec(spec).mesh.sp
    blocks = [sum(s.weights for s in profile.denoiser.segments[c.lo : c.hi])
              for c in profile.denoiser.cuts]  # fmt: skip
    whole = peaks(f"{spec},warmup=1" if "pipe" in spec else spec, "pixart-alpha")
    shared = peaks(f"{spec},weights=hsdp", "pixart-alpha")
    for before, after in zip(whole, shared, strict=True):
        held = sum(blocks) / parse_spec(spec).mesh.pp
        saved = 2 * (held * (1 - 1 / width) - 2 * max(blocks))
        assert before.weights - after.weights == pytest.approx(saved, rel=1e-3)
        assert before.buffers == after.buffers


def test_sharding_gathers_each_block_once_a_forward() -> None:
    """Received: (n-1)/n of the blocks' bytes a step; PipeFusion pays once a patch where a stage has
    several blocks."""
    weights = BLOCKS * (64 + 128) * ELEMENT

    def more(spec: str) -> float:
        both = [
            build(parse_spec(s), DIT, TOY).received_bytes()[0]
            for s in (f"{spec},weights=hsdp", spec)
        ]
        return both[0] - both[1]

    assert more("ulysses=4") == 6 * weights * 3 / 4
    assert more("cfg=2,ring=2") == 6 * weights / 2
    assert more("pipefusion=2,ulysses=2,patches=4,warmup=1") == (1 + 5 * 4) * weights / 2 / 2
    assert more("pipefusion=4,ulysses=2,patches=4,warmup=1") == 6 * weights / 4 / 2


def test_without_ranks_in_lock_step_there_is_nothing_to_shard() -> None:
    for spec in (
        "serial",
        "cfg=2",
        "data=4",
        "pipefusion=4",
        "asyncdiff=2,warmup=1",
        "batchstep=2",
    ):
        with pytest.raises(Infeasible, match="no two ranks") as caught:
            build(parse_spec(f"{spec},weights=hsdp"), DIT, TOY)
        assert caught.value.nearest == "weights=fp8"


# ----------------------------------------------------------------------------------------------- fp8


def test_fp8_halves_the_weights_and_casts_them_up() -> None:
    """One byte a parameter; each segment's cast reads one byte and writes two for each of them."""
    (before,), (after,) = peaks("serial"), peaks("serial,weights=fp8")
    assert before.weights - after.weights == model("flux1-dev").denoiser.params
    assert not facts(parse_spec("serial,weights=fp8"), TOY).exact
    assert facts(parse_spec("ulysses=2,weights=hsdp"), TOY).exact

    profile, gpu = model("flux1-dev"), load_gpu("l4")
    costs = CostModel(profile, [gpu])
    graph = build(parse_spec("serial,weights=fp8"), profile, Workload(1024, 1024, 1, 4))
    works = {op.work for s in graph.sections for op in s.ops if op.work and op.work.stored}
    (work,) = works
    plain = costs.compute(work._replace(stored=""), 0)
    extra = costs.compute(work, 0).device_s - plain.device_s
    assert extra == pytest.approx(
        3 * profile.denoiser.params / gpu.memory_bandwidth.value, rel=0.02
    )


def test_sharded_fp8_moves_half_the_bytes() -> None:
    def gathered(weights: str) -> int:
        graph = build(parse_spec(f"ulysses=2,weights={weights}"), DIT, TOY)
        return sum(op.nbytes for s in graph.sections for op in s.ops if "weights." in op.name)

    assert gathered("hsdp") == 2 * gathered("fp8+hsdp")
