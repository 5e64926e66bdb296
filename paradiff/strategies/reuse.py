"""Every rank sees the whole latent: serial, CFG, data and sequence parallelism, with features reused.

Fixed-interval caching (FORA, DeepCache and others, strategies.md 16): in some steps most of the network
gives again what it gave in the last step that was computed whole. ``cache=K`` computes every K-th step
whole; ``skip=3:4:7`` reuses in these steps, as a data-dependent rule has once decided. Which steps is
fixed before the run, so all ranks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from paradiff.graph import Ref
from paradiff.strategies.asyncdiff import Component, components_of
from paradiff.strategies.builder import Builder, Infeasible, Lane, Options, strip
from paradiff.strategies.layers import SequenceParallel, local_shape, plan_sequence
from paradiff.strategies.passes import (
    Latent,
    every_step,
    finish_run,
    gather_pieces,
    noise,
    run_whole,
    whole_pass,
)

Run = tuple[int, int, int, tuple[bool, ...]]
"""(first step, how often, stride, for each of its steps whether it is computed whole)."""


def reused_steps(options: Options, steps: int) -> frozenset[int]:
    """Steps that reuse. Raises Infeasible for a step that is not there or has nothing to reuse."""
    every = int(options.get("cache", "1"))
    skipped = frozenset(int(t) for t in options["skip"].split(":")) if "skip" in options else set()
    if skipped and not all(0 < t < steps for t in skipped):
        raise Infeasible(
            f"skip={options['skip']}: steps between 1 and {steps - 1}; step 0 has nothing to reuse",
            f"cache={min(2, steps)}",
        )
    return frozenset(t for t in range(steps) if t % every or t in skipped)


def runs_of(options: Options, steps: int) -> list[Run]:
    """The steps as sections: whole periods of ``cache``, or stretches of equal steps of ``skip``."""
    reused = reused_steps(options, steps)
    if "skip" not in options:
        every = int(options["cache"])
        period = tuple(t == 0 for t in range(every))
        whole, rest = divmod(steps, every)
        found: list[Run] = [(0, whole, every, period)]
        return [*found, (whole * every, 1, 1, period[:rest])] if rest else found
    stretches = [(again, list(run)) for again, run in groupby(range(steps), reused.__contains__)]
    return [(run[0], len(run), 1, (not again,)) for again, run in stretches]


@dataclass(frozen=True)
class Reuse:
    """One way to run the denoiser whole, and one that reuses what ``kept`` gave.

    A transformer computes its last block and the head again, a U-Net its input, its shallowest blocks
    on both sides and its output (DeepCache).
    """

    build: Builder
    sp: SequenceParallel
    fresh: Component
    kept: Component

    def held(self, rank: int, step: int, *, fixed: bool = False) -> list[Ref]:
        """Outputs of the reused modules as computed in ``step``."""
        shape = local_shape(self.build, self.sp, self.build.rows)
        outputs = {cut.name: cut.out for cut in self.build.denoiser.cuts}
        found = []
        for name, size in self.kept.modules:
            if self.sp.degree > 1:  # a transformer's blocks, of which a rank has a share
                size = self.build.nbytes(outputs[name], shape)
            buffer = self.build.buffer(f"cache.{name}", rank, size, "hidden", module=name)
            found.append(Ref(buffer, step, None, fixed))
        return found

    def predict(
        self, lanes: Sequence[Lane], step: int, latent: Latent, old: tuple[int, bool] | None
    ) -> dict[int, Ref]:
        """The prediction on every rank, whole or with what was computed in step ``old``."""
        build, sp = self.build, self.sp
        for lane in lanes:
            if old is None:
                keep = {rank: self.held(rank, step) for rank in lane.ranks}
                run_whole(build, sp, lane, step, latent, writes=keep)
                continue
            reads = {rank: self.held(rank, old[0], fixed=old[1]) for rank in lane.ranks}
            if len(self.fresh.ranges) == 1:
                start = self.fresh.ranges[0][0]
                run_whole(build, sp, lane, step, latent, start=start, reads=reads)
                continue
            for rank in lane.ranks:
                size = build.latent_bytes(build.rows, build.call_batch)
                build.compute(
                    "fresh",
                    rank,
                    "denoiser",
                    local_shape(build, sp, build.rows),
                    ranges=self.fresh.ranges,
                    call="forward",
                    step=step,
                    reads=[latent(rank), build.text(rank), *reads[rank]],
                    writes=[noise(build, rank, size, step)],
                    tags=lane.tags(strip(build.rows, 1, 0)),
                )
        return gather_pieces(build, lanes, sp.degree, world=False, step=step)


def owners_of_reuse(build: Builder) -> list[int]:
    """For each cut: 0 if it is computed in every step, 1 if its output is reused."""
    cuts = build.denoiser.cuts
    if build.profile.kind == "transformer":
        return [1] * (len(cuts) - 1) + [0]
    down = next(c.parent for c in cuts if c.parent.startswith("down"))
    up = next((c.parent for c in reversed(cuts) if c.parent.startswith("up")), down)
    outer = {c.parent for c in cuts if not c.parent.startswith(("down", "mid", "up"))}
    return [int(c.parent not in {down, up, *outer}) for c in cuts]


def whole(build: Builder, options: Options) -> None:
    """Serial, CFG, data, Ulysses, Ring and USP; with features reused where the options say so."""
    if not {"cache", "skip"} & options.keys():
        every_step(build, whole_pass(build, options))
        return
    owners = owners_of_reuse(build)
    if len(set(owners)) == 1 or build.profile.skips:
        why = "skip connections into its last blocks" if build.profile.skips else "too few blocks"
        raise Infeasible(f"{build.profile.name} has {why} to reuse the output of others", "serial")
    fresh, kept = components_of(build, owners)
    if len(fresh.ranges) > 1 and build.mesh.tp > 1:
        raise Infeasible(
            f"tensor={build.mesh.tp} with reused steps: {build.profile.name} computes both of its ends"
            " again in one piece, inside which ranks cannot add up",
            "tensor=1",
        )
    reuse = Reuse(build, plan_sequence(build, options, 1), fresh, kept)
    build.encode()
    last = 0
    for number, (first, count, stride, computed) in enumerate(
        runs_of(options, build.workload.steps)
    ):
        with build.section(f"steps{number}", first, count, stride):
            for step, is_whole in enumerate(computed):
                old = None if is_whole else (0, False) if computed[0] else (last, True)
                latent = partial(build.x, step=step)
                for lanes in build.mesh.replicas():
                    for rank, eps in reuse.predict(lanes, step, latent, old).items():
                        build.update(rank, [eps], [build.x(rank, step + 1)], step=step)
        if computed[0]:
            last = first + (count - 1) * stride
    finish_run(build, build.workload.steps)
