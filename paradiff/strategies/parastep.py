"""Step level: ParaStep (arXiv 2505.14741), over devices or as a batch on one.

Consecutive steps are predicted at the same time, each at a latent that was stepped forward with the
noise of the time before. Rules as in the reference code (strategies.md 14). A step is predicted by
a *group*: one rank, or ranks that share any exact pass (section 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paradiff.graph import Ref
from paradiff.strategies.builder import Builder, Infeasible, Lane, Options
from paradiff.strategies.passes import (
    Predict,
    finish_run,
    noise,
    strip_pass,
    whole_pass,
    whole_rows,
)


@dataclass(frozen=True)
class ParaStep:
    """One request on groups that take consecutive steps; the first holds the authoritative latent.

    Ranks at the same place of two groups are *twins*: a group's ranks all hold the whole prediction,
    and each sends it to its twin in the first group.
    """

    build: Builder
    groups: tuple[tuple[Lane, ...], ...]
    predict: Predict
    _own: dict[int, Ref] = field(default_factory=dict)

    @property
    def degree(self) -> int:
        return len(self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of a prediction: both branches."""
        return self.build.latent_bytes(self.build.rows, self.build.call_batch * self.build.mesh.cfg)

    def ranks(self, group: int) -> list[int]:
        """Ranks of a group, in the order of their twins."""
        return [rank for lane in self.groups[group] for rank in lane.ranks]

    def own(self, rank: int, step: int) -> Ref:
        """The last noise that the group of ``rank`` predicted itself, in ``step``."""
        return self._own[rank]._replace(step=step)

    def latent(self, rank: int, step: int, *, corrected: bool) -> Ref:
        """Latent of ``rank`` entering ``step``: as it stepped itself, or as it was broadcast to it."""
        return self.build.x(rank, step, int(corrected and rank not in self.ranks(0)))

    def forward(self, group: int, step: int, *, corrected: bool = False) -> None:
        """One group predicts ``step``."""
        self._own.update(
            self.predict(
                self.groups[group], step, lambda rank: self.latent(rank, step, corrected=corrected)
            )
        )

    def warmup(self) -> None:
        """Every group predicts and steps; all latents stay equal."""
        for group in range(self.degree):
            self.forward(group, 0)
            for rank in self.ranks(group):
                self.build.update(rank, [self.own(rank, 0)], [self.build.x(rank, 1)])

    def cycle(self, length: int, *, first: bool) -> None:
        """``length`` steps: group r evaluates step r at its own approximate latent.

        Until its turn a group steps with the noise of its last turn (age p - k + r; in the first cycle
        that of the last warm-up step), afterwards with its new one, which only keeps its latent warm.
        """
        for r in range(length):
            corrected = r == 0 and not first
            self.forward(r, r, corrected=corrected)
            if r:
                for source, target in zip(self.ranks(r), self.ranks(0), strict=True):
                    own, there = self.own(source, r), [self.received(target, r)]
                    self.build.send("eps", source, target, self.nbytes, own, there, step=r)
            for group in range(self.degree):
                for rank in self.ranks(group):
                    self.reuse(rank, group, r, first=first, corrected=corrected)
        if length == self.degree:
            self.share_latent(length)

    def received(self, rank: int, r: int) -> Ref:
        """Group r's noise on a rank of the first; receives are posted early, so each r has a buffer."""
        return noise(self.build, rank, self.nbytes, r, f"eps.{r}")

    def reuse(self, rank: int, group: int, r: int, *, first: bool, corrected: bool) -> None:
        """The scheduler step r of the cycle on ``rank``."""
        if group == 0:
            read = self.received(rank, r) if r else self.own(rank, 0)
        elif group <= r:
            read = self.own(rank, group)
        else:
            read = self.own(rank, -1 if first else group - self.degree)
        x = self.latent(rank, r, corrected=corrected)
        self.build.update(rank, [read], [self.build.x(rank, r + 1)], step=r, x=[x])

    def share_latent(self, length: int) -> None:
        """The first group's latent replaces every other at the end of a full cycle, twin by twin."""
        size = self.build.latent_bytes(self.build.rows, self.build.workload.batch)
        for twins in zip(*(self.ranks(group) for group in range(self.degree)), strict=True):
            x = [self.latent(r, length, corrected=True) for r in twins]
            self.build.collective(
                "broadcast", "bcast.x", twins, size, x[:1], x[1:], step=length - 1, channel="world"
            )


@dataclass(frozen=True)
class BatchStep:
    """ParaStep's groups as entries of one batch on one rank: latent and noise have a part for each."""

    build: Builder
    degree: int
    rank: int

    def x(self, k: int, step: int) -> Ref:
        """Latent of entry k entering ``step``."""
        size = self.build.latent_bytes(self.build.rows, self.build.workload.batch)
        return Ref(self.build.buffer("x", self.rank, self.degree * size, "latent"), step, k)

    def own(self, k: int, step: int) -> Ref:
        """The last noise of entry k, predicted in ``step``."""
        size = self.degree * self.build.latent_bytes(self.build.rows, self.build.call_batch)
        return noise(self.build, self.rank, size, step)._replace(part=k)

    def forward(self, entries: int, latents: list[Ref]) -> None:
        """One call on ``entries`` latents, entry k at the timestep of step k."""
        build = self.build
        shape = build.shape(build.rows, batch=entries * build.call_batch)
        ahead = (("timesteps", "+".join(map(str, range(entries)))),) if entries > 1 else ()
        build.compute(
            "full",
            self.rank,
            "denoiser",
            shape,
            call="forward",
            reads=[*latents, build.text(self.rank)],
            writes=[self.own(k, k) for k in range(entries)],
            tags=(*whole_rows(build), *ahead),
        )

    def step(self, k: int, r: int, read: Ref, x: Ref | None = None) -> None:
        """Entry k takes scheduler step r with the noise ``read``."""
        x, after = x or self.x(k, r), [self.x(k, r + 1)]
        self.build.update(self.rank, [read], after, step=r, tag=f"/k{k}", x=[x])

    def warmup(self) -> None:
        """One prediction; all entries step with it, so that their schedulers have the same history."""
        self.forward(1, [self.x(0, 0)])
        for k in range(self.degree):
            self.step(k, 0, self.own(0, 0))

    def cycle(self, length: int, *, first: bool) -> None:
        """Entries step to their turns with their last noise; one call; all step on with the new."""
        for k in range(1, length):
            for r in range(k):
                self.step(k, r, self.last(k, first=first), None if first or r else self.x(0, 0))
        self.forward(length, [self.x(k, k) for k in range(length)])
        for r in range(length):
            self.step(0, r, self.own(r, r))
        for k in range(1, length):
            for r in range(k, length):
                self.step(k, r, self.own(k, k))

    def last(self, k: int, *, first: bool) -> Ref:
        """What entry k predicted in its last turn; in the first cycle the last warm-up step's."""
        return self.own(0, -1) if first else self.own(k, k - self.degree)


def plan_cycles(build: Builder, name: str, options: Options) -> tuple[int, int]:
    """(degree, warm-up), checked. Raises Infeasible."""
    steps, degree = build.workload.steps, int(options[name])
    warmup = int(options.get("warmup", "5"))
    if degree < 2:
        raise Infeasible(f"{name}=1: every step waits for the one before", f"{name}=2")
    if not 1 <= warmup <= steps:
        raise Infeasible(
            f"warmup={warmup}: the noise to reuse comes from at least one of the {steps} steps",
            f"warmup={min(max(1, warmup), steps)}",
        )
    return degree, warmup


def in_cycles(
    build: Builder, degree: int, warmup: int, runs: Sequence[ParaStep] | Sequence[BatchStep]
) -> None:
    """Warm-up steps, cycles of ``degree`` steps, and what is left."""
    cycles, tail = divmod(build.workload.steps - warmup, degree)
    with build.section("warmup", 0, warmup):
        for run in runs:
            run.warmup()
    for name, start, count, length in (
        ("first", warmup, min(1, cycles), degree),
        ("cycles", warmup + degree, cycles - 1, degree),
        ("tail", warmup + cycles * degree, int(tail > 0), tail),
    ):
        first = name == "first" or (name == "tail" and not cycles)
        with build.section(name, start, count, stride=degree):
            for run in runs:
                run.cycle(length, first=first)


def parastep(build: Builder, options: Options) -> None:
    """Reuse-then-predict step parallelism, each step by one rank or by a group of them."""
    degree, warmup = plan_cycles(build, "parastep", options)
    predict = (strip_pass if "patch" in options else whole_pass)(build, options)
    runs = [ParaStep(build, groups, predict) for groups in build.mesh.step_groups()]
    build.encode()
    in_cycles(build, degree, warmup, runs)
    finish_run(build, build.workload.steps)


def batchstep(build: Builder, options: Options) -> None:
    """ParaStep's cycle as one batch on one device: p latents, each at its own timestep."""
    degree, warmup = plan_cycles(build, "batchstep", options)
    runs = [BatchStep(build, degree, lanes[0].ranks[0]) for lanes in build.mesh.replicas()]
    build.encode(lambda _: [(0, build.rows)] * degree)
    in_cycles(build, degree, warmup, runs)
    with build.section("decode", build.workload.steps):
        for run in runs:
            build.decode(run.rank, [run.x(0, 0)])
