"""One request made ready: model, graph, inputs; then run in one process, or as one rank of several.

Everything that can be wrong with the input is found here, before any process group is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils._pytree import tree_map

from paradiff.executor.conditioning import encode_prompt, read_conditioning
from paradiff.executor.decoding import strip_decoder
from paradiff.executor.interpreter import Request, Result, check_executable, run_graph
from paradiff.executor.loading import Pipeline, load
from paradiff.executor.network import Conditioning, random_conditioning
from paradiff.executor.outputs import decoder, write_outputs
from paradiff.executor.schedulers import GuidanceScale, check_scheduler, scheduler_named
from paradiff.executor.streams import Progress
from paradiff.graph import ScheduleGraph
from paradiff.models.interception import compile_between_points
from paradiff.profiles import Profile
from paradiff.strategies import Spec, Workload, build, parse_spec
from paradiff.strategies.tiling import Tiling, tiling

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
SIZES = ("height", "width", "frames", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be run, as it was asked for. Sizes that are None are the model's own.

    ``source``: a twin (``tiny-sdxl``), a small trained model (``small-dit``), a local directory, or with
    ``random_weights`` a model of the catalogue. ``planned``: of the plan that was made for this very
    model, fingerprint of the schedule (None where the size is another) and parameters of the denoiser.
    """

    source: str
    spec: str
    random_weights: bool = False
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    batch: int = 1
    dtype: str = "fp32"
    device: str = "cpu"
    is_compiled: bool = False
    seed: int = 0
    guidance_scale: float | None = None
    scheduler: str | None = None
    embeddings: Path | None = None
    prompt: str | None = None
    negative_prompt: str = ""
    image: Path | None = None
    planned: tuple[str | None, int] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job with nothing left to go wrong but the run."""

    pipeline: Pipeline
    graph: ScheduleGraph
    request: Request
    device: str

    def in_process(self, progress: Progress | None = None, *, in_turn: bool = False) -> Result:
        """All ranks in this process, one op after another (on a GPU: if ``in_turn``, else a stream for
        each stream). Raises RunFailed."""
        network = self.pipeline.network
        return run_graph(self.graph, network, self.request, progress, in_turn=in_turn)

    def save(self, result: Result, folder: Path) -> None:
        """Latents and what they decode to, as files. Raises OSError; none is left then."""
        write_outputs(folder, self.pipeline, result.latents, result.decoded)


def prepare(
    job: Job, pipeline: Pipeline | None = None, given: Sequence[Conditioning] | None = None
) -> Prepared:
    """Load the model, build the graph, make the conditioning of each replica; ``pipeline`` and ``given``
    where that has been done. Raises ValueError: what is wrong, and what is allowed (Infeasible, with the
    nearest legal choice, for a strategy that the model cannot run)."""
    pipeline = pipeline or loaded(job)
    network, spec = pipeline.network, parse_spec(job.spec)
    workload = workload_of(job, network.profile)
    graph = build(spec, network.profile, workload)
    if job.planned is not None:
        _check_planned(job.source, graph, network.profile.denoiser.params, *job.planned)
    scheduler = pipeline.scheduler
    if job.scheduler is not None:
        scheduler = scheduler_named(job.scheduler, scheduler)
    check_scheduler(scheduler, workload.steps)
    request = Request(
        conditioning=given
        or [
            _conditioning(job, pipeline, workload, job.seed + replica)
            for replica in range(spec.degree("data"))
        ],
        scheduler=scheduler,
        seed=job.seed,
        guidance_scale=_guidance(job, pipeline),
        dtype=DTYPES[job.dtype],
        decode=decoder(pipeline, _tiling(spec, network.profile)),
        strips=strip_decoder(pipeline) if spec.options.get("vae") == "split" else None,
    )
    check_executable(graph, network, request)
    if job.is_compiled:
        compile_between_points(network.model, network.point_of)
    return Prepared(pipeline, graph, request, job.device)


def _check_planned(
    source: str, graph: ScheduleGraph, params: int, schedule: str | None, parameters: int
) -> None:
    found = graph.fingerprint()
    if params != parameters or schedule not in (None, found):
        planned = "" if schedule is None else f" and schedule {schedule[:12]}"
        raise ValueError(
            f"{source}: {params} parameters, schedule {found[:12]}; the plan has {parameters}"
            f"{planned}: it was made for another model or size"
        )


def _guidance(job: Job, pipeline: Pipeline) -> GuidanceScale:
    """As asked for: where the pipeline's grows over the frames, that of the last frame."""
    own, asked = pipeline.guidance_scale, job.guidance_scale
    if asked is None:
        return own
    return (min(own[0], asked), asked) if isinstance(own, tuple) else asked


def _tiling(spec: Spec, profile: Profile) -> Tiling | None:
    """How latents are cut where they are decoded in tiles."""
    return tiling(profile, spec.tile) if spec.options.get("vae") == "tiled" else None


def loaded(job: Job) -> Pipeline:
    """The model of a job. Raises ValueError."""
    if job.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {job.device}: torch sees no GPU here, allowed: cpu")
    number, count = torch.device(job.device).index, torch.cuda.device_count()
    if number is not None and number >= count:
        raise ValueError(
            f"device {job.device}: torch sees {count} GPUs here, allowed: cuda:0 to cuda:{count - 1}"
        )
    return load(
        job.source,
        random_weights=job.random_weights,
        dtype=DTYPES[job.dtype],
        device=torch.device(job.device),
        seed=job.seed,
    )


def _conditioning(job: Job, pipeline: Pipeline, workload: Workload, seed: int) -> Conditioning:
    """What the network is given beside the latent: of a file, of a prompt, or drawn from ``seed``."""
    network, dtype = pipeline.network, DTYPES[job.dtype]
    size = workload.height, workload.width, workload.frames
    shape = network.profile.latent_shape(*size, workload.batch)
    if job.embeddings is not None:
        return read_conditioning(job.embeddings, network, shape, dtype)
    if pipeline.encode is not None:
        given = pipeline.encode(job.prompt, workload.batch, seed, dtype)
        return tree_map(lambda t: t.to(job.device), given)
    if job.prompt is not None or job.image is not None:
        return encode_prompt(
            pipeline,
            shape,
            size,
            job.prompt if job.image is None else _read_image(job.image),
            negative_prompt=job.negative_prompt,
            guidance_scale=job.guidance_scale,
            seed=seed,
        )
    branches = 2 if network.profile.geometry.guidance == "cfg" else 1
    shape = {**shape, "b": branches * shape["b"]}
    scale = {} if job.guidance_scale is None else {"guidance_scale": job.guidance_scale}
    given = random_conditioning(network, shape, seed, dtype, **scale)
    return tree_map(lambda t: t.to(job.device) if isinstance(t, torch.Tensor) else t, dict(given))


def _read_image(file: Path) -> Image.Image:
    """Raises ValueError for what is no picture."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not readable as an image: {error}") from None


def workload_of(job: Job, profile: Profile) -> Workload:
    """What was asked for, the rest as the model has it by default."""
    asked = {name: getattr(job, name) for name in SIZES}
    sizes = {name: profile.defaults[name] if n is None else n for name, n in asked.items()}
    return Workload(**sizes, batch=job.batch, dtype=job.dtype)
