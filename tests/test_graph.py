"""The contract: text, fingerprint, validation, edges, and what is derived from a graph alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from cases import CASES, graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_hardware import Graph

from paradiff.dependencies import Dependencies, validate
from paradiff.graph import (
    COLLECTIVES,
    Buffer,
    Instance,
    InvalidGraph,
    Op,
    Ref,
    ScheduleGraph,
    Section,
    Shape,
    Work,
    parse_graph,
    sends,
    traffic,
)

# ---------------------------------------------------------------------------------- random graphs

names = st.from_regex(r"[a-z][a-z0-9_./>-]{0,8}", fullmatch=True)


@st.composite
def refs(draw: st.DrawFn, buffers: list[Buffer]) -> Ref:
    return Ref(
        draw(st.sampled_from(buffers)).id,
        draw(st.integers(-9, 99)),
        draw(st.none() | st.integers(0, 20)),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
    )


@st.composite
def ops(draw: st.DrawFn, world: int, buffers: list[Buffer]) -> Op:
    kind = draw(st.sampled_from(("compute", "collective", "permute", "p2p", "host")))
    count = {"compute": 1, "p2p": 2, "host": 1}.get(kind, draw(st.integers(1, world)))
    work = None
    if kind == "compute":
        ranges = tuple(
            draw(st.lists(st.tuples(st.integers(0, 9), st.integers(10, 99)), max_size=3))
        )
        shape = Shape(*draw(st.tuples(*[st.integers(0, 999)] * 10)))
        blocks, copies = draw(st.integers(1, 9)), draw(st.integers(0, 9))
        copied = draw(st.integers(0, 10**12)) if copies else 0
        work = Work(
            "denoiser", ranges, shape, draw(st.sampled_from(("", "fp8"))), blocks, copies, copied
        )._replace(once=draw(st.booleans()))
    return Op(
        name=draw(names),
        kind=kind,
        call=draw(st.sampled_from(COLLECTIVES)),
        ranks=tuple(draw(st.permutations(range(world)))[:count]),
        stream=draw(names),
        reads=tuple(draw(st.lists(refs(buffers), max_size=3))),
        writes=tuple(draw(st.lists(refs(buffers), max_size=3))),
        step=draw(st.none() | st.integers(0, 50)),
        work=work,
        nbytes=draw(st.integers(0, 10**12)),
    )


@st.composite
def written_graphs(draw: st.DrawFn) -> ScheduleGraph:
    """Anything that can be written down, valid or not."""
    world = draw(st.integers(2, 4))
    buffers = [
        Buffer(f"{draw(names)}{i}@r{i % world}", i % world, draw(st.integers(0, 10**9)), "kv")
        for i in range(draw(st.integers(1, 5)))
    ]
    sections = tuple(
        Section(
            f"s{i}",
            draw(st.integers(0, 99)),
            draw(st.integers(1, 50)),
            draw(st.integers(1, 3)),
            tuple(draw(st.lists(ops(world, buffers), max_size=4))),
        )
        for i in range(draw(st.integers(0, 3)))
    )
    meta = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3))
    return ScheduleGraph(world, tuple(buffers), sections, tuple(sorted(meta.items())))


@settings(max_examples=100)
@given(written_graphs())
def test_the_text_round_trips(graph: ScheduleGraph) -> None:
    assert parse_graph(graph.text()) == graph


@settings(max_examples=50)
@given(written_graphs())
def test_the_fingerprint_is_that_of_the_unrolled_form(graph: ScheduleGraph) -> None:
    assert graph.unroll().fingerprint() == graph.fingerprint()
    assert graph.unroll().op_count() == graph.op_count()


# ---------------------------------------------------------------------------------- small pictures


def stale_ring(n: int = 2, steps: int = 5) -> ScheduleGraph:
    """Each step reads the gather of the step before; the first reads what ``start`` wrote."""
    g = Graph(n)
    for r in range(n):
        g.compute("start", r, 1, writes=["all#-1"])
    g.section("start", 0)
    for r in range(n):
        g.compute("net", r, 1, reads=["all#-1"], writes=["own"])
    g.collective("all_gather", "gather", range(n), 100, "own", "all")
    g.section("loop", 0, steps)
    return g.build()


def edited(graph: ScheduleGraph, section: int, op: int, **values: object) -> ScheduleGraph:
    """``graph`` with one op changed."""
    ops_ = list(graph.sections[section].ops)
    ops_[op] = replace(ops_[op], **values)
    sections = list(graph.sections)
    sections[section] = replace(sections[section], ops=tuple(ops_))
    return replace(graph, sections=tuple(sections))


def test_the_text_is_readable() -> None:
    lines = stale_ring().text().splitlines()
    assert lines[0] == "paradiff-graph/1"
    assert lines[1] == "world 2"
    assert "section loop first=0 count=5 stride=1" in lines
    assert (
        "op 0 gather collective all_gather ranks=0,1 stream=comm reads=own@r0#t,own@r1#t "
        "writes=all@r0#t,all@r1#t bytes=100"
    ) in lines
    assert any("reads=all@r1#t-1 " in line for line in lines)


def test_the_fingerprint_sees_every_field_but_meta_and_sections() -> None:
    graph = stale_ring()
    other = stale_ring()
    assert graph.fingerprint() == other.fingerprint()
    assert replace(graph, meta=(("a", "b"),)).fingerprint() == graph.fingerprint()
    half = replace(
        graph,
        sections=(
            graph.sections[0],
            replace(graph.sections[1], count=2),
            replace(graph.sections[1], first=2, count=3),
        ),
    )
    assert half.fingerprint() == graph.fingerprint()
    gather = graph.sections[1].ops[2]
    changes = [
        {"name": "other"}, {"call": "all_reduce"}, {"ranks": (1, 0)}, {"stream": "x"},
        {"nbytes": 101}, {"reads": gather.reads[:1]}, {"writes": gather.writes[::-1]},
        {"kind": "permute"}, {"step": None},
    ]  # fmt: skip
    seen = {edited(graph, 1, 2, **change).fingerprint() for change in changes}
    seen.add(graph.fingerprint())
    seen.add(replace(graph, world_size=3).fingerprint())
    seen.add(replace(graph, buffers=graph.buffers[:-1]).fingerprint())
    assert len(seen) == len(changes) + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("graph", "line 1"),
        ("paradiff-graph/1\nworld two", "line 2"),
        ("paradiff-graph/1\nworld 1\nbuffer x@r0 10 fog", "line 3: kind 'fog'"),
        ("paradiff-graph/1\nbanana 1", "unknown word 'banana'"),
        ("paradiff-graph/1\nop 0 a compute f ranks=0 stream=s reads= writes= bytes=0", "line 2"),
        (
            "paradiff-graph/1\nsection s first=0 count=1 stride=1\n"
            "op 0 a dance f ranks=0 stream=s reads= writes= bytes=0",
            "line 3: kind 'dance'",
        ),
        (
            "paradiff-graph/1\nsection s first=0 count=1 stride=1\n"
            "op 0 a compute f ranks=0 stream=s reads=x writes= bytes=0",
            "line 3: ref 'x'",
        ),
    ],
)
def test_malformed_text_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InvalidGraph, match=message):
        parse_graph(text)


# ---------------------------------------------------------------------------------- validation


def test_a_read_of_a_version_that_is_gone_shows_the_place() -> None:
    bad = edited(stale_ring(), 1, 1, reads=(Ref("all@r1", -2),))
    with pytest.raises(InvalidGraph) as error:
        validate(bad)
    text = str(error.value)
    assert "t000/net@r1 reads all@r1#-2, which is not there" in text
    assert "version -1.0" in text
    lines = text.splitlines()
    assert lines[1].startswith("r0: start@r0 | ") or lines[1].startswith("r0: t000/start@r0 | ")
    assert lines[2].endswith("t000/net@r1  <-- here")
    assert "<-- here" not in lines[1]


def test_a_cycle_is_drawn() -> None:
    # a reads what c writes, c reads what b writes, b follows a on the stream.
    g = Graph(1)
    read = [g.ref(name, 0) for name in ("x", "y")]
    for name, reads, writes in [
        ("a", [read[0]], []),
        ("b", [], [read[1]]),
        ("c", [read[1]], [read[0]]),
    ]:
        g.compute(name, 0, 1)
        g.ops[-1] = replace(g.ops[-1], reads=tuple(reads), writes=tuple(writes))
    with pytest.raises(InvalidGraph) as error:
        g.build()
    lines = str(error.value).splitlines()
    assert lines[1] == "cycle:"
    # The chain closes: each line's subject is what the line before ends with, the last ends with a.
    assert any("t000/a@r0 reads x@r0#0 of t000/c@r0" in line for line in lines)
    assert all(line.startswith("  t000/") for line in lines[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (0, 5)}, "ranks .* in a world of 2"),
        ({"ranks": ()}, "ranks"),
        ({"ranks": (0, 0)}, "ranks"),
        ({"kind": "compute"}, "a compute op runs on one rank"),
        ({"kind": "p2p", "ranks": (0,)}, "a source and a destination"),
        ({"call": "gossip"}, "gossip.*all_gather, all_reduce"),
        ({"reads": (Ref("nothing@r0", 0),)}, "nothing@r0 is not declared"),
        ({"ranks": (0,)}, "touches own@r1"),
        ({"name": "net@r0"}, "occurs twice"),
    ],
)
def test_every_rule_has_its_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidGraph, match=message):
        validate(edited(stale_ring(), 1, 2, **change))


def test_a_version_is_written_once_and_a_buffer_declared_once() -> None:
    graph = stale_ring()
    again = edited(graph, 1, 2, writes=(Ref("own@r0", 0),))
    with pytest.raises(InvalidGraph, match="writes own@r0#0 a second time"):
        validate(again)
    with pytest.raises(InvalidGraph, match="declared twice"):
        validate(replace(graph, buffers=(*graph.buffers, graph.buffers[0])))


# ---------------------------------------------------------------------------------- edges


def edges(graph: ScheduleGraph) -> dict[str, list[str]]:
    dependencies, ids, found = Dependencies(), [], {}
    for handle, instance in enumerate(graph.instances()):
        ids.append(instance.id)
        found[instance.id] = sorted(ids[h] for h in dependencies.add(instance, handle))
    return found


def test_edges_are_producers_last_readers_and_streams() -> None:
    found = edges(stale_ring(2, 3))
    # Step 1 of rank 0: reads the gather of step 0 and follows net of step 0, whose output, which it
    # overwrites, that gather read.
    assert found["t001/net@r0"] == ["t000/gather", "t000/net@r0"]
    # The gather writes over what net of the same step read, reads what it wrote, follows on comm.
    assert found["t001/gather"] == ["t000/gather", "t001/net@r0", "t001/net@r1"]


def test_a_write_waits_for_readers_on_other_streams() -> None:
    g = Graph(1)
    g.compute("write", 0, 1, writes=["x"])
    g.compute("read", 0, 1, reads=["x"], stream="side")
    g.compute("again", 0, 1, writes=["x#1"])
    found = edges(g.build())
    assert found["t000/again@r0"] == ["t000/read@r0", "t000/write@r0"]


def part(name: str, step: int, index: int | None) -> Ref:
    return Ref(f"{name}@r0", step, index)


def test_parts_are_apart_but_not_from_the_whole() -> None:
    buffers = (Buffer("x@r0", 0, 8, "kv"),)

    def op(name: str, stream: str, reads: tuple[Ref, ...], writes: tuple[Ref, ...]) -> Op:
        return Op(name, "host", "f", (0,), stream, reads, writes, 0)

    ops_ = (
        op("p0", "a", (), (part("x", 0, 0),)),
        op("p1", "b", (), (part("x", 0, 1),)),
        op("read1", "c", (part("x", 0, 1),), ()),
        op("p0'", "d", (), (part("x", 1, 0),)),
        op("whole", "e", (), (part("x", 2, None),)),
        op("p1'", "f", (), (part("x", 3, 1),)),
    )
    graph = ScheduleGraph(1, buffers, (Section("s", 0, 1, 1, ops_),))
    found = edges(graph)
    assert found["t000/p1"] == []
    assert found["t000/p0'"] == ["t000/p0"]  # nobody read part 0, part 1 is apart
    assert found["t000/whole"] == ["t000/p0'", "t000/p1", "t000/read1"]
    assert found["t000/p1'"] == ["t000/whole"]
    late = (*ops_, op("gone", "g", (part("x", 2, None),), ()))
    with pytest.raises(InvalidGraph, match="which is not there"):
        validate(ScheduleGraph(1, buffers, (Section("s", 0, 1, 1, late),)))


def test_versions_within_a_step_keep_apart() -> None:
    g = Graph(1)
    x = g.ref("x", 0)
    for i in range(3):
        g.compute(f"op{i}", 0, 1, stream=f"s{i}")
        reads = (x._replace(sub=i - 1),) if i else ()
        g.ops[-1] = replace(g.ops[-1], reads=reads, writes=(x._replace(sub=i),))
    graph = g.build()
    assert edges(graph)["t000/op2@r0"] == ["t000/op1@r0"]
    assert parse_graph(graph.text()) == graph


def test_advance_stands_for_the_iterations_it_leaves_out() -> None:
    # Two iterations of 40 are added, 38 are told of; what comes after must see edges and versions as
    # if all had been added, up to the numbering of handles.
    graph = stale_ring(3, 40)
    n = len(graph.sections[1].ops)
    tail = Op(
        "tail", "collective", "all_gather", (0, 1, 2), "comm",
        (Ref("all@r0", 39, None, True),), (Ref("own@r1", 40, None, True),), 40,
    )  # fmt: skip
    full, short = Dependencies(), Dependencies()
    handle = 0
    for instance in graph.instances():
        full.add(instance, handle)
        handle += 1
    expected = full.add(Instance(tail, 0), handle)
    handle = 0
    for instance in graph.shortened(2).instances():
        short.add(instance, handle)
        handle += 1
    first = len(graph.sections[0].ops)
    short.advance(38, lambda h: h >= first, 38 * n)
    assert short.add(Instance(tail, 0), handle + 38 * n) == expected


# ---------------------------------------------------------------------------------- derived numbers


def test_bytes_follow_the_cost_algebra() -> None:
    # n = 4, payload 1000 in the convention of each call (strategies.md 0.5).
    expected = {
        "all_gather": 3000, "all_reduce": 1500, "reduce_scatter": 750, "all_to_all": 750,
    }  # fmt: skip
    for call, nbytes in expected.items():
        op = Op("c", "collective", call, (0, 1, 2, 3), "s", nbytes=1000)
        assert traffic(op) == dict.fromkeys(range(4), (nbytes, nbytes)), call
    chain = traffic(Op("c", "collective", "broadcast", (2, 0, 1), "s", nbytes=10))
    assert chain == {2: (10, 0), 0: (10, 10), 1: (0, 10)}
    ring = traffic(Op("c", "permute", "permute", (0, 1, 2), "s", nbytes=10))
    assert ring == dict.fromkeys(range(3), (10, 10))
    assert traffic(Op("c", "p2p", "send", (1, 0), "s", nbytes=10)) == {1: (10, 0), 0: (0, 10)}
    assert traffic(Op("c", "compute", "f", (0,), "s")) == {}


def test_who_sends_is_who_has_bytes_to_send() -> None:
    """A message has its direction; around a ring everyone sends and receives; a chain has two ends. Of
    every transfer of every strategy: ``traffic`` gives bytes to the same ranks."""
    assert sends("p2p", "send", (1, 0)) == [(1, 0)]
    assert sends("permute", "permute", (2, 0, 1)) == [(2, 0), (0, 1), (1, 2)]
    assert sends("collective", "all_reduce", (0, 1)) == [(0, 1), (1, 0)]
    assert sends("collective", "broadcast", (2, 0, 1)) == [(2, 0), (0, 1)]
    assert sends("collective", "all_gather", (3,)) == sends("compute", "f", (0,)) == []
    seen = set()
    for profile, spec in CASES:
        for section in graph_of(profile, spec).sections:
            for op in (op for op in section.ops if len(op.ranks) > 1 and op.nbytes > 0):
                pairs, moved = sends(op.kind, op.call, op.ranks), traffic(op)
                assert {a for a, _ in pairs} == {r for r, (out, _) in moved.items() if out}
                assert {b for _, b in pairs} == {r for r, (_, back) in moved.items() if back}
                seen.add(op.call)
    assert {"send", "all_gather", "all_reduce", "all_to_all"} <= seen


def test_totals_count_iterations() -> None:
    graph = stale_ring(4, 25)
    assert graph.op_count() == 4 + 25 * 5
    assert graph.bytes_by_call()[2] == {"all_gather": (25 * 300, 25 * 300)}
    assert graph.received_bytes() == dict.fromkeys(range(4), 25 * 300)


def test_staleness_is_the_readers_step_minus_the_versions() -> None:
    assert stale_ring().staleness() == 1
    frozen = edited(stale_ring(2, 6), 1, 0, reads=(Ref("all@r0", -1, None, True),))
    # Read at step 5 of the loop: 5 - (-1).
    assert frozen.staleness() == 6
    text = replace(frozen, buffers=tuple(replace(b, kind="text") for b in frozen.buffers))
    assert text.staleness() == 0


def peak_by_hand(graph: ScheduleGraph, kinds: set[str]) -> dict[int, int]:
    """Every op in turn: which buffers hold a version that a later op (or this one) still touches."""
    kept = {b.id: b for b in graph.buffers if b.kind in kinds}
    touched: dict[tuple[str, int | None, int, int], list[int]] = defaultdict(list)
    for position, (op, base) in enumerate(graph.instances()):
        for ref in (*op.reads, *op.writes):
            touched[ref.buffer, ref.part, ref.at(base), ref.sub].append(position)
    peak = dict.fromkeys(range(graph.world_size), 0)
    for position in range(graph.op_count()):
        alive = {
            version[0]
            for version, at in touched.items()
            if version[0] in kept and min(at) <= position <= max(at)
        }
        for rank in peak:
            now = sum(kept[b].nbytes for b in alive if kept[b].rank == rank)
            peak[rank] = max(peak[rank], now)
    return peak


@settings(max_examples=60)
@given(st.data())
def test_peak_bytes_against_a_second_derivation(data: st.DataObject) -> None:
    # A random straight-line program of versions on two ranks, repeated: the buffers written in an
    # iteration are read in it, or in the next.
    g = Graph(2)
    kinds = ("latent", "hidden", "kv")
    for i in range(6):
        key = f"b{i}@r{i % 2}"
        size = data.draw(st.integers(1, 50))
        g.buffers[key] = Buffer(key, i % 2, size, data.draw(st.sampled_from(kinds)))
    late = data.draw(st.lists(st.integers(0, 5), max_size=2, unique=True))
    order = data.draw(st.permutations(range(6)))
    for i in late:
        g.compute(f"init{i}", i % 2, 1, writes=[f"b{i}#-1"])
    g.section("init", 0)
    for i in order:
        if i in late:
            g.compute(f"stale{i}", i % 2, 1, reads=[f"b{i}#-1"])
        g.compute(f"write{i}", i % 2, 1, writes=[f"b{i}"])
        if data.draw(st.booleans()):
            g.compute(f"read{i}", i % 2, 1, reads=[f"b{i}"])
    g.section("loop", 0, data.draw(st.integers(1, 9)))
    graph = g.build()
    for wanted in ({"latent", "hidden", "kv"}, {"kv"}):
        assert graph.peak_bytes(wanted) == peak_by_hand(graph, wanted)


def test_shortened_keeps_the_schedule() -> None:
    graph = stale_ring(2, 30)
    short = graph.shortened(3)
    validate(short)
    assert short.op_count() == 2 + 3 * 3
    assert short.sections[1].first == 0
    assert graph.shortened(99) == graph
