"""Step level: AsyncDiff (arXiv 2406.06911).

Decides which rank evaluates which part of the network for which step. Rules as in the reference code
(strategies.md 13). Each guidance branch may have ranks of its own (section 15): all of them then
exchange predictions with their twins of the other branch before a scheduler step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paradiff.graph import Ref
from paradiff.profiles import Cut
from paradiff.strategies.builder import Builder, Infeasible, Lane, Options, Tags, balanced_owners
from paradiff.strategies.passes import finish_run, noise


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the network: its segment ranges, and (name, bytes) of what it broadcasts."""

    ranges: tuple[tuple[int, int], ...]
    modules: tuple[tuple[str, int], ...]


def owners_of(build: Builder, components: int, cuts: str) -> tuple[int, ...]:
    """Owner of each cut: the published table, balanced, or starts ``i:j`` of components 1, 2, ..."""
    count = len(build.denoiser.cuts)
    if not 2 <= components <= count:
        raise Infeasible(
            f"asyncdiff={components}: between 2 and {count} components",
            f"asyncdiff={min(max(2, components), count)}",
        )
    if cuts == "published" and components in build.profile.asyncdiff:
        return build.profile.asyncdiff[components]
    if cuts in ("published", "balanced"):
        return balanced_owners(build, components)
    starts = [int(s) for s in cuts.split(":")]
    if len(starts) != components - 1 or sorted({*starts, 0, count}) != [0, *starts, count]:
        balanced = balanced_owners(build, components)
        nearest = ":".join(str(balanced.index(c)) for c in range(1, components))
        raise Infeasible(
            f"cuts={cuts}: {components - 1} rising block numbers between 1 and {count - 1}",
            f"cuts={nearest}",
        )
    return tuple(sum(i >= s for s in starts) for i in range(count))


def components_of(build: Builder, owners: Sequence[int]) -> list[Component]:
    """Ranges and broadcast modules of each component.

    What precedes the first cut belongs to its component, what follows a cut to that cut's. In a U-Net
    a block inside one component is one module (its whole output tuple, skips included), a block that
    is cut inside is broadcast by its parts; a transformer sends the hidden state at each boundary, and
    what skips over one.
    """
    cuts, end = build.denoiser.cuts, len(build.denoiser.segments)
    starts = [0, *(c.lo for c in cuts[1:]), end]
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(max(owners) + 1)]
    for i, owner in enumerate(owners):
        mine = ranges[owner]
        if mine and mine[-1][1] == starts[i]:
            mine[-1] = (mine[-1][0], starts[i + 1])
        else:
            mine.append((starts[i], starts[i + 1]))
    modules = _unet_modules if build.profile.kind == "unet" else _boundaries
    sent = modules(build, cuts, owners)
    return [Component(tuple(r), tuple(sent[c])) for c, r in enumerate(ranges)]


def _boundaries(
    build: Builder, cuts: Sequence[Cut], owners: Sequence[int]
) -> list[list[tuple[str, int]]]:
    shape = build.shape(build.rows)
    sent: list[list[tuple[str, int]]] = [[] for _ in range(max(owners) + 1)]
    crossing = {a for a, b in build.profile.skips if owners[a] != owners[b]}
    for i, (cut, owner, following) in enumerate(zip(cuts, owners, owners[1:], strict=False)):
        if owner != following or i in crossing:
            sent[owner].append((cut.name, build.nbytes(cut.out, shape)))
    return sent


def _unet_modules(
    build: Builder, cuts: Sequence[Cut], owners: Sequence[int]
) -> list[list[tuple[str, int]]]:
    shape = build.shape(build.rows)
    parents = dict(build.denoiser.parents)
    sent: list[list[tuple[str, int]]] = [[] for _ in range(max(owners) + 1)]
    for cut, owner in zip(cuts, owners, strict=True):
        whole = {o for c, o in zip(cuts, owners, strict=True) if c.parent == cut.parent} == {owner}
        name, out = (cut.parent, parents.get(cut.parent)) if whole else (cut.name, cut.out)
        module = (name, build.nbytes(out or cut.out, shape))
        if module not in sent[owner]:
            sent[owner].append(module)
    return sent


@dataclass(frozen=True)
class AsyncDiff:
    """One request on ``components + stride - 1`` ranks of each guidance branch, which stand at the same
    *places* of their lanes; ``cache`` holds every module's last output."""

    build: Builder
    components: tuple[Component, ...]
    stride: int
    lanes: tuple[Lane, ...]

    @property
    def ranks(self) -> list[int]:
        return [rank for lane in self.lanes for rank in lane.ranks]

    @property
    def last(self) -> int:
        """Place of the last component; the extra rank of stride 2 evaluates it once more."""
        return len(self.components) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of a network output."""
        return self.build.latent_bytes(self.build.rows, self.build.call_batch)

    def tags(self, lane: Lane) -> Tags:
        """Tags of a forward on the whole latent."""
        return lane.tags((0, self.build.rows))

    def output(self, rank: int, step: int, name: str = "eps") -> Ref:
        """Network output of ``step`` on ``rank``, of its branch."""
        return noise(self.build, rank, self.nbytes, step, name)

    def prediction(self, rank: int, step: int, name: str = "eps") -> Ref:
        """Network output of ``step`` of all branches, on ``rank``."""
        if len(self.lanes) == 1:
            return self.output(rank, step, name)
        size = self.nbytes * len(self.lanes)
        return noise(self.build, rank, size, step, f"{name}_all")

    def cached(self, rank: int, step: int, component: int | None = None) -> list[Ref]:
        """Outputs of all modules (of one component) as computed in ``step``, held on ``rank``."""
        chosen = self.components if component is None else [self.components[component]]
        return [
            Ref(self.build.buffer(f"cache.{name}", rank, size, "hidden", module=name), step)
            for each in chosen
            for name, size in each.modules
        ]

    def warmup(self, *, keep: bool, shared: bool = True) -> None:
        """Every rank runs the whole network; the last warm-up step may ``keep`` the module outputs.

        All ranks then hold the same, but where a broadcast follows (``shared``: each round of stride 1,
        a replay; the references do it although it brings nothing new) only their owner writes them.
        """
        build = self.build
        for lane in self.lanes:
            for place, rank in enumerate(lane.ranks):
                held: list[Ref] = []
                if keep and not shared:
                    held = self.cached(rank, 0)
                elif keep and place <= self.last:
                    held = self.cached(rank, 0, place)
                build.compute(
                    "full",
                    rank,
                    "denoiser",
                    build.shape(build.rows),
                    call="forward",
                    reads=[build.x(rank), build.text(rank)],
                    writes=[self.output(rank, 0), *held],
                    tags=self.tags(lane),
                )
        self.advance(0, 0)

    def broadcast(self, step: int, version: int) -> None:
        """Every module's output of ``version``, owner by owner, blocking, on one channel."""
        for c, component in enumerate(self.components):
            for i, (name, size) in enumerate(component.modules):
                for lane in self.lanes:
                    held = {r: self.cached(r, version, c)[i] for r in lane.ranks}
                    self.hand_out(name, lane.ranks[c], size, held, step)

    def hand_out(
        self, name: str, owner: int, size: int, held: Mapping[int, Ref], step: int
    ) -> None:
        """What ``owner`` has, to the other ranks of its branch; each keeps it where ``held`` says."""
        others = [r for r in held if r != owner]
        self.build.collective(
            "broadcast",
            f"bcast.{name}",
            [owner, *others],
            size,
            [held[owner]],
            [held[r] for r in others],
            step=step,
            channel="world",
        )

    def run_component(
        self, c: int, place: int, step: int, read: int, *, keep: bool, ahead: int = 0
    ) -> None:
        """Component c at ``place`` with all other modules' outputs of step ``read``, at the timestep
        of ``ahead`` steps later."""
        build = self.build
        for lane in self.lanes:
            rank = lane.ranks[place]
            writes = self.cached(rank, step, c) if keep else []
            if c == self.last:
                writes = [*writes, self.output(rank, step, "eps_own")]
            build.compute(
                f"component{c}",
                rank,
                "denoiser",
                build.shape(build.rows),
                ranges=self.components[c].ranges,
                call="forward",
                step=step,
                reads=[build.x(rank, step), build.text(rank), *self.cached(rank, read)],
                writes=writes,
                tags=(*self.tags(lane), *([("timestep", str(ahead))] if ahead else [])),
            )

    def share_output(self, source: int, step: int, computed: int, name: str = "eps") -> None:
        """The prediction computed at place ``source`` in step ``computed`` goes to all ranks of its
        branch, as ``name``, and all take scheduler step ``step`` with it."""
        for lane in self.lanes:
            owner = lane.ranks[source]
            held = {
                r: self.output(r, computed, "eps_own" if r == owner else name) for r in lane.ranks
            }
            self.hand_out(name, owner, self.nbytes, held, step)
        self.advance(step, computed, name, source)

    def advance(self, step: int, computed: int, name: str = "eps", source: int = -1) -> None:
        """Scheduler step ``step`` on all ranks with the prediction of ``computed``, once both branches
        have it; each holds that of its own as ``name``, at place ``source`` as it was computed."""
        for place, twins in enumerate(zip(*(lane.ranks for lane in self.lanes), strict=True)):
            own = "eps_own" if place == source else name
            held = [self.output(rank, computed, own) for rank in twins]
            if len(twins) > 1:
                both = [self.prediction(rank, computed, name) for rank in twins]
                self.build.collective(
                    "all_gather", f"{name}_all", twins, self.nbytes, held, both, step=step
                )
                held = both
            for rank, eps in zip(twins, held, strict=True):
                self.build.update(rank, [eps], [self.build.x(rank, step + 1)], step=step)

    def replay(self) -> None:
        """The step after an even warm-up takes the prediction of the one before again."""
        self.broadcast(0, -1)
        for rank in self.ranks:
            self.build.update(rank, [self.prediction(rank, -1)], [self.build.x(rank, 1)])

    def round(self) -> None:
        """Stride 1: broadcast the outputs of the step before, compute, share the prediction."""
        self.broadcast(0, -1)
        for c in range(len(self.components)):
            self.run_component(c, c, 0, -1, keep=True)
        self.share_output(self.last, 0, 0)

    def double_round(self, read: int, *, replay: bool) -> None:
        """Stride 2: one computation serves two scheduler steps; the second replays the caches.

        So the components compute at the second one's timestep; in the last step of a run there is none.
        """
        for c in range(len(self.components)):
            self.run_component(c, c, 0, read, keep=True, ahead=int(replay))
        self.run_component(self.last, self.last + 1, 0, read, keep=False)
        self.share_output(self.last + 1, 0, 0)
        if replay:
            self.broadcast(1, 0)
            self.share_output(self.last, 1, 0, "eps_replay")


def asyncdiff(build: Builder, options: Options) -> None:
    """Asynchronous denoising by model parallelism, strides 1 and 2."""
    steps, stride = build.workload.steps, int(options.get("stride", "1"))
    warmup = int(options.get("warmup", "9"))
    if not 1 <= warmup <= steps:
        raise Infeasible(
            f"warmup={warmup}: the caches are filled by at least one of the {steps} steps",
            f"warmup={min(max(1, warmup), steps)}",
        )
    owners = owners_of(build, int(options["asyncdiff"]), options.get("cuts", "published"))
    components = tuple(components_of(build, owners))
    runs = [AsyncDiff(build, components, stride, lanes) for lanes in build.mesh.replicas()]
    build.encode()
    with build.section("warmup", 0, warmup - 1):
        for run in runs:
            run.warmup(keep=False)
    with build.section("warmup_last", warmup - 1):
        for run in runs:
            run.warmup(keep=warmup < steps, shared=stride == 1 or warmup % 2 == 0)
    if stride == 1:
        with build.section("rounds", warmup, steps - warmup):
            for run in runs:
                run.round()
    else:
        _double_rounds(build, runs, warmup, steps)
    finish_run(build, steps)


def _double_rounds(build: Builder, runs: Sequence[AsyncDiff], warmup: int, steps: int) -> None:
    """Rounds at odd steps, replays at even ones; an even warm-up is followed by a replay of itself.

    The first round reads the warm-up's caches, the others those of two steps before.
    """
    lead = int(warmup % 2 == 0 and warmup < steps)
    start = warmup + lead
    pairs, tail = divmod(steps - start, 2)
    with build.section("replay", warmup, lead):
        for run in runs:
            run.replay()
    for name, first, count, read, replay in (
        ("first", start, min(1, pairs), -1 - lead, True),
        ("rounds", start + 2, pairs - 1, -2, True),
        ("tail", start + 2 * pairs, tail, -2 if pairs else -1 - lead, False),
    ):
        with build.section(name, first, count, stride=2 if name == "rounds" else 1):
            for run in runs:
                run.double_round(read, replay=replay)
