"""Specs that only a given box suggests: stages cut by time where its GPUs differ, exchanges in two
phases where it has several machines.

Strategies know no devices, so what the box decides is written into the spec (``stages=11:11:3:3``,
``exchange=8x2``, with V first where a model can), and a plan says the same everywhere. How long these
take is simulated like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, product

from paradiff.graph import Shape, Work
from paradiff.profiles import Profile
from paradiff.strategies import Workload
from paradiff.strategies.builder import Builder, Mesh
from simulator.costs import CostModel
from simulator.memory import CONTEXT_BYTES
from simulator.network import Network
from simulator.partition import Partition, partition
from simulator.topology import Topology


def tailored_specs(
    profile: Profile, workload: Workload, costs: CostModel, network: Network, gpus: int
) -> Iterator[str]:
    """Specs on up to ``gpus`` GPUs of this box, beside ``candidate_specs``."""
    guided = profile.geometry.guidance == "cfg"
    names = network.topology.profiles[:gpus]
    attentions = {at for at, _ in profile.denoiser.points("kv")}
    orders = ["", ",order=v-first"] if attentions == profile.denoiser.projections().keys() else [""]
    for (n, inside), order in product(_groups_over_machines(network.topology, gpus), orders):
        yield f"ulysses={n},exchange={inside}x{n // inside}{order}"
        if guided and 2 * n <= gpus:
            yield f"cfg=2,ulysses={n},exchange={inside}x{n // inside}{order}"
    if len(set(names)) > 1:
        uneven = _Uneven(profile, workload, costs, network, names)
        for cfg in (1, 2) if guided else (1,):
            yield from uneven.pipelines(cfg)
        yield from uneven.components()


def _groups_over_machines(topology: Topology, gpus: int) -> Iterator[tuple[int, int]]:
    """(ranks, GPUs of a machine) of Ulysses groups on whole machines of equal size."""
    sizes = {len(node.gpus) for node in topology.nodes}
    inside = next(iter(sizes))
    if len(sizes) == 1 and inside > 1:
        for n in (2 * inside, 4 * inside, 8 * inside):
            if n <= gpus:
                yield n, inside


class _Uneven:
    """Cuts by time on a box whose GPUs differ."""

    def __init__(
        self,
        profile: Profile,
        workload: Workload,
        costs: CostModel,
        network: Network,
        names: Sequence[str],
    ) -> None:
        self.profile, self.workload = profile, workload
        self.costs, self.network, self.names = costs, network, names
        self.device = {name: names.index(name) for name in names}
        self.blocks = len(profile.denoiser.cuts)

    def block_s(self, shape: Shape) -> dict[str, list[float]]:
        """Kind of GPU -> seconds of each block; what precedes the blocks belongs to the first, what
        follows one to it."""
        ends = [c.lo for c in self.profile.denoiser.cuts[1:]]
        ranges = zip([0, *ends], [*ends, len(self.profile.denoiser.segments)], strict=True)
        works = [Work("denoiser", (each,), shape) for each in ranges]
        return {
            name: [self.costs.compute(work, device).device_s for work in works]
            for name, device in self.device.items()
        }

    def cut(
        self, units: Sequence[str], shape: Shape, patches: int | None = None
    ) -> Partition | None:
        """Blocks over stages of which each runs on one of ``units``; None if these are all alike. With
        ``patches``, stages send to the next and the last sends latents to the first."""
        if len(set(units)) == 1:
            return None
        build = Builder(self.profile, self.workload, Mesh())
        out = [build.nbytes(c.out, shape) for c in self.profile.denoiser.cuts]

        latent = build.latent_bytes(shape.r, self.workload.batch)

        def message_s(here: str, there: str, nbytes: int) -> float:
            a, b = self.device[here], self.device[there]
            b = next((d for d, n in enumerate(self.names) if n == there and d != a), b)
            return self.network.message_s(a, b, nbytes)

        def send_s(blocks: int, here: str, there: str) -> float:
            return 0.0 if patches is None else message_s(here, there, out[blocks - 1])

        def loop_s(last: str, first: str) -> float:
            return message_s(last, first, latent)

        held = list(accumulate(self.held_bytes(), initial=0.0))

        def fits(first: int, last: int, name: str) -> bool:
            room = self.costs.gpus[self.device[name]].memory.value - self.resident_bytes()
            return held[last] - held[first] <= room

        have = Counter(units)
        ordered = {name: have[name] for name in self.device if have[name]}
        block_s = self.block_s(shape)
        after_s = None if patches is None else self.decode_s()
        find = partial(
            partition, block_s, ordered, len(units), send_s,
            after_s=after_s, patches=patches, loop_s=loop_s,
        )  # fmt: skip
        # where nothing fits as it is, the fastest cut is still the one to offload or shard
        return find(fits=fits) or find()

    def decode_s(self) -> dict[str, float]:
        """Kind of GPU -> seconds of the stages after the loop, where the last stage of a pipeline is."""
        build = Builder(self.profile, self.workload, Mesh())
        shape = build.shape(build.rows, batch=self.workload.batch)
        works = [
            Work(name, ((0, len(self.profile.stages[name].segments)),), shape)
            for name in build.stages(before=False)
        ]
        return {
            name: sum(self.costs.compute(work, device).device_s for work in works)
            for name, device in self.device.items()
        }

    def held_bytes(self) -> list[int]:
        """Weights and the K/V cache of each block."""
        build, stage = Builder(self.profile, self.workload, Mesh()), self.profile.denoiser
        shape = build.shape(build.rows)
        kv = dict(stage.points("kv"))
        return [
            build.element_bytes * sum(s.weights for s in stage.segments[c.lo : c.hi])
            + sum(build.nbytes(kv[i].elements, shape) for i in range(c.lo, c.hi) if i in kv)
            for c in stage.cuts
        ]

    def resident_bytes(self) -> float:
        """What every rank holds beside its blocks: text encoders and the CUDA context."""
        build = Builder(self.profile, self.workload, Mesh())
        params = sum(self.profile.stages[name].params for name in build.stages(before=True))
        return build.element_bytes * params + CONTEXT_BYTES

    def units(self, stages: int, width: int, cfg: int) -> list[str]:
        """The slowest GPU of each stage's ranks with rank r on GPU r: ``width`` ranks a stage, on each
        of ``cfg`` branches."""
        total = {n: sum(s) for n, s in self.block_s(self.shape(1)).items()}
        groups = [
            [
                self.names[c * stages * width + d * width + j]
                for c in range(cfg)
                for j in range(width)
            ]
            for d in range(stages)
        ]
        return [max(group, key=total.__getitem__) for group in groups]

    def shape(self, parts: int, cfg: int = 1) -> Shape:
        """One of ``parts`` of the rows, all of them visible."""
        build = Builder(self.profile, self.workload, Mesh(cfg=cfg))
        return build.shape(max(1, build.rows // parts))

    def pipelines(self, cfg: int) -> Iterator[str]:
        """PipeFusion of every width that powers of two, or all GPUs, allow."""
        if self.profile.kind != "transformer" or self.profile.skips:
            return
        room = len(self.names) // cfg
        for n in [n for n in range(2, room + 1) if n & (n - 1) == 0 or n == room]:
            for stages in [s for s in range(2, min(n, self.blocks) + 1) if n % s == 0]:
                width = n // stages
                for patches in (stages, 2 * stages):
                    shape = self.shape(patches * width, cfg)
                    found = self.cut(self.units(stages, width, cfg), shape, patches)
                    if found is not None:
                        counts = ":".join(map(str, found.counts))
                        yield (
                            f"{'cfg=2,' * (cfg == 2)}pipefusion={stages}"
                            f"{f',ulysses={width}' * (width > 1)},patches={patches}"
                            f",stages={counts},warmup=1"
                        )

    def components(self) -> Iterator[str]:
        """AsyncDiff of 2 to 4 components, stride 1; every rank receives every broadcast, so only the
        computation decides the cuts."""
        warmup = max(1, min(9, self.workload.steps // 5))
        for n in range(2, min(4, len(self.names), self.blocks) + 1):
            found = self.cut(self.names[:n], self.shape(1))
            if found is not None:
                starts = ":".join(map(str, list(accumulate(found.counts))[:-1]))
                yield f"asyncdiff={n},stride=1,warmup={warmup},cuts={starts}"
