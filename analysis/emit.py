"""A plan as the launch line or the snippet of an engine that people run: xDiT, diffusers and others.

Decides what an engine can express and in which words, and says why it cannot where it cannot. Runs no
engine: names and models are kept here with their source, and ``tests/test_emit.py`` holds them against
the engines' own parsers and classes where these can be installed. An engine runs the same split, not
this project's schedule; precision, guidance and seed stay its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from paradiff.profiles import Profile
from paradiff.strategies import Infeasible, Spec, Workload, build, candidate_specs, parse_spec
from paradiff.strategies.builder import Builder
from paradiff.strategies.pipefusion import block_counts
from simulator.planner import Candidate, Plan, Request
from simulator.planner import plan as simulate
from simulator.topology import Topology

EngineName = Literal["xdit", "diffusers", "sglang", "vllm-omni", "cache-dit"]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Inexpressible(ValueError):
    """A plan that an engine has no words for; the message says what."""


@dataclass(frozen=True, slots=True)
class Support:
    """What an engine can split of a model, and, for xDiT, what runs it.

    ``whole_frames``: sequence ranks get whole latent frames of a clip.
    """

    axes: frozenset[str] = frozenset()
    run: str = ""
    whole_frames: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine in its own words.

    ``degrees``: axis of a spec -> option or field. ``models``: shipped profile, else class of its
    denoiser -> what can be split. ``rotate``: how its ring passes keys and values.
    ``apart``: two groups of axes that it does not combine.
    """

    degrees: Mapping[str, str]
    models: Mapping[str, Support]
    write: Callable[[Engine, Launch], str]
    rotate: frozenset[str] = frozenset({"p2p"})
    apart: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

    def support(self, profile: Profile) -> Support | None:
        return self.models.get(profile.name) or self.models.get(denoiser_class(profile))


@dataclass(frozen=True, slots=True)
class Launch:
    """What is to be written; ``placement`` lists the GPU of each rank."""

    spec: Spec
    profile: Profile
    workload: Workload
    placement: tuple[int, ...]
    support: Support

    def degrees(self, engine: Engine) -> dict[str, int]:
        """Option or field of every axis that is split, in the order of the spec."""
        return {
            engine.degrees[axis]: self.spec.degree(axis)
            for axis in self.spec.options
            if axis in engine.degrees and self.spec.degree(axis) > 1
        }

    @property
    def visible(self) -> str:
        """Prefix that puts each rank on its GPU; empty where ranks are on the first GPUs in order."""
        if self.placement == tuple(range(self.spec.n_gpus)):
            return ""
        return f"CUDA_VISIBLE_DEVICES={','.join(map(str, self.placement))} "


def denoiser_class(profile: Profile) -> str:
    """Class name of the denoiser in diffusers; empty where the profile does not say."""
    models = profile.source.get("models", {})
    return str(models.get("denoiser", {}).get("class", "")) if isinstance(models, dict) else ""


def emit(
    name: EngineName,
    spec: Spec,
    profile: Profile,
    workload: Workload,
    placement: Sequence[int] | None = None,
) -> str:
    """The launch line or snippet of one plan. Raises Inexpressible.

    Example: ``ulysses=8`` of flux1-dev is for xdit
    ``xdit --model FLUX.1-dev --prompt "$PROMPT" ... --ulysses_degree 8``.
    """
    engine = ENGINES[name]
    support = engine.support(profile)
    if support is None:
        what = denoiser_class(profile) or "an unknown class"
        known = ", ".join(engine.models)
        raise Inexpressible(f"not known of {name}: {profile.name} ({what}); known: {known}")
    _check_axes(name, engine, spec, profile, support)
    ranks = tuple(placement or range(spec.n_gpus))
    return engine.write(engine, Launch(spec, profile, workload, ranks, support))


def _check_axes(name: str, engine: Engine, spec: Spec, profile: Profile, support: Support) -> None:
    """Raise Inexpressible for the first part of ``spec`` that the engine does not have."""
    if spec.name == "pipefusion" and "pipefusion" in support.axes:
        parameters = frozenset({"patches", "stages", "warmup"})
    else:
        parameters = frozenset({"serial"})
    for key, value in spec.options.items():
        if key == "rotate" or (key, value) == ("order", "qkv"):
            continue
        if key in engine.degrees:
            if spec.degree(key) > 1 and key not in support.axes:
                possible = ", ".join(sorted(support.axes)) or "nothing"
                raise Inexpressible(f"{name} has no {key} for {profile.name}; it splits {possible}")
        elif key in ("offload", "weights", "vae", "tile", "cache", "skip"):
            raise Inexpressible(f"{key}={value} is not carried over to {name}: only splits are")
        elif key not in parameters:
            raise Inexpressible(f"{name} has no {key}={value}")
    rotate = spec.options.get("rotate", "p2p")
    if spec.degree("ring") > 1 and rotate not in engine.rotate:
        raise Inexpressible(
            f"{name} has no rotate={rotate} (the default is p2p); its ring has"
            f" rotate={'|'.join(sorted(engine.rotate))}"
        )
    split = {axis for axis in engine.degrees if spec.degree(axis) > 1}
    if all(group & split for group in engine.apart):
        both = " and ".join(", ".join(sorted(group & split)) for group in engine.apart)
        raise Inexpressible(f"{name} does not combine {both}")


def recommended(name: EngineName, request: Request, plan: Plan) -> str:
    """The best of ``plan`` for the engine. Raises Inexpressible with the reason and, of all that the
    engine can express, the one that ranks best on this box."""
    best, box = plan.ranked[0], request.topology
    try:
        if not _on_one_machine(box, best):
            raise Inexpressible("it spans machines, and a launch line is of one")
        spec = parse_spec(best.spec)
        return emit(name, spec, request.profile, request.workload, best.placement)
    except Inexpressible as error:
        gpus = min(request.gpus, max(len(node.gpus) for node in box.nodes))
        specs = tuple(expressible(name, request.profile, request.workload, gpus))
        ranked = simulate(replace(request, specs=specs, top=1)).ranked if specs else ()
        nearest = [c.spec for c in ranked if _on_one_machine(box, c)][:1]
        words = [f"{best.spec}: {error}", *(f"nearest: --strategy {text}" for text in nearest)]
        raise Inexpressible("; ".join(words)) from None


def _on_one_machine(box: Topology, candidate: Candidate) -> bool:
    return len({box.node_of(gpu).name for gpu in candidate.placement or ()}) <= 1


def expressible(name: EngineName, profile: Profile, workload: Workload, gpus: int) -> Iterator[str]:
    """Specs on up to ``gpus`` GPUs that build and that the engine can express."""
    for candidate in candidate_specs(profile, workload, gpus):
        texts = [candidate, candidate.replace(",stages=balanced", "")]
        if "ring=" in candidate:
            texts.append(f"{candidate},rotate=allgather")
        for text in dict.fromkeys(texts):
            spec = parse_spec(text)
            try:
                emit(name, spec, profile, workload)
                build(spec, profile, workload)
            except (Inexpressible, Infeasible):
                continue
            yield text


# ------------------------------------------------------------------------------------------- writers


def _command(words: Mapping[str, object], program: str) -> str:
    """``program --name value ...``, an option a line; True is a bare flag."""
    lines = [f"{name}" if value is True else f"{name} {value}" for name, value in words.items()]
    return " \\\n  ".join([program, *lines])


def _sizes(workload: Workload, frames: str) -> dict[str, object]:
    """Height, width and, of a clip, frames, as options."""
    sizes: dict[str, object] = {"--height": workload.height, "--width": workload.width}
    return sizes | ({frames: workload.frames} if workload.frames > 1 else {})


def _xdit(engine: Engine, plan: Launch) -> str:
    """``xdit`` for the models that its runner knows by name, else one of its example scripts."""
    script = plan.support.run.endswith(".py")
    prompts = plan.spec.degree("data") * plan.workload.batch
    if plan.workload.batch > 1 and not script:
        raise Inexpressible("the xdit command makes one picture or clip a call, not a batch")
    degrees: dict[str, object] = dict(plan.degrees(engine))
    if degrees.pop("--use_cfg_parallel", None):
        degrees["--use_cfg_parallel"] = True
    options = {
        "--model": '"$MODEL"' if script else plan.support.run,
        "--prompt": " ".join(['"$PROMPT"'] * prompts),
        **_sizes(plan.workload, "--num_frames"),
        "--num_inference_steps": plan.workload.steps,
        **degrees,
        **_pipeline(plan, script=script),
    }
    if not script:
        return _command(options, f"{plan.visible}xdit")
    launch = f"torchrun --nproc_per_node={plan.spec.n_gpus} {plan.support.run}"
    return _command(options, plan.visible + launch)


def _pipeline(plan: Launch, *, script: bool) -> dict[str, object]:
    """Options of PipeFusion. The runner has only the degree: patches as many as stages, one warm-up
    step and ceil(L/N) blocks a stage are its fixed choice (config/config.py, base_transformer.py)."""
    spec, stages = plan.spec, plan.spec.degree("pipefusion")
    if stages == 1:
        return {}
    patches, warmup = int(spec.options.get("patches", stages)), spec.options.get("warmup", "1")
    builder = Builder(plan.profile, plan.workload, spec.mesh)
    blocks = block_counts(builder, spec.options.get("stages"))
    most = -(-sum(blocks) // stages)
    usual = all(count == most for count in blocks[:-1])
    if script:
        split = {} if usual else {"--attn_layer_num_for_pp": " ".join(map(str, blocks))}
        return {"--num_pipeline_patch": patches, "--warmup_steps": warmup, **split}
    for given, fixed, what in (
        (patches, stages, "patches"),
        (int(warmup), 1, "warmup"),
        (usual, True, f"stages={':'.join(map(str, blocks))}: blocks are divided equally"),
    ):
        if given != fixed:
            choice = what if fixed is True else f"{what}={given}: it is always {fixed}"
            raise Inexpressible(f"the xdit command of {plan.profile.name} cannot set {choice}")
    return {}


def _sglang(engine: Engine, plan: Launch) -> str:
    if plan.workload.batch > 1:
        raise Inexpressible("sglang generate takes one prompt a call, not a batch")
    w, ranks = plan.workload, plan.spec.degree("ulysses") * plan.spec.degree("ring")
    latent = plan.profile.latent_shape(w.height, w.width, w.frames, w.batch)["f"]
    if plan.support.whole_frames and latent % ranks:
        raise Inexpressible(
            f"sglang cuts {plan.profile.name} between latent frames: {latent} over {ranks} ranks, for"
            " which it would make a longer clip"
        )
    options = {
        "--model-path": '"$MODEL"',
        "--prompt": '"$PROMPT"',
        **_sizes(plan.workload, "--num-frames"),
        "--num-inference-steps": plan.workload.steps,
        "--num-gpus": plan.spec.n_gpus,
        **plan.degrees(engine),
    }
    return _command(options, f"{plan.visible}sglang generate")


def _vllm_omni(engine: Engine, plan: Launch) -> str:
    """The server; sizes and steps belong to each request, and are written as a comment."""
    w = plan.workload
    frames = f", {w.frames} frames" if w.frames > 1 else ""
    request = f"# each request: {w.width}x{w.height}{frames}, {w.steps} steps, batch {w.batch}\n"
    options: dict[str, object] = {"--omni": True, **plan.degrees(engine)}
    return request + _command(options, f'{plan.visible}vllm serve "$MODEL"')


SNIPPET = """\
# {visible}torchrun --nproc-per-node={gpus} this_file.py MODEL PROMPT
import sys

{imports}
{setup}
model, prompt = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.{dtype}).to("cuda")
{parallel}
result = pipe({call})
{teardown}
"""
GROUP = """
torch.distributed.init_process_group("nccl")
torch.cuda.set_device(torch.distributed.get_rank())
"""


def _snippet(plan: Launch, imports: str, parallel: str) -> str:
    w, many = plan.workload, plan.spec.n_gpus > 1
    call = {"height": w.height, "width": w.width, "num_inference_steps": w.steps}
    if w.frames > 1:
        call["num_frames"] = w.frames
    if w.batch > 1:
        call["num_images_per_prompt" if w.frames == 1 else "num_videos_per_prompt"] = w.batch
    text = SNIPPET.format(
        visible=plan.visible,
        gpus=plan.spec.n_gpus,
        imports=imports,
        setup=GROUP if many else "",
        dtype=DTYPES[w.dtype],
        parallel=parallel,
        call=", ".join(["prompt", *(f"{key}={value}" for key, value in call.items())]),
        teardown="torch.distributed.destroy_process_group()" if many else "",
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


def _arguments(degrees: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in degrees.items())


def _diffusers(engine: Engine, plan: Launch) -> str:
    """``enable_parallelism``; a ring needs a backend that returns the log-sum-exp, native does not
    (diffusers 0.42.1, models/attention_dispatch.py)."""
    degrees = plan.degrees(engine)
    if not degrees:
        return _snippet(plan, "import torch\nfrom diffusers import DiffusionPipeline", "")
    config = "TensorParallelConfig" if "tp_degree" in degrees else "ContextParallelConfig"
    backend = 'pipe.transformer.set_attention_backend("_native_cudnn")\n'
    return _snippet(
        plan,
        f"import torch\nfrom diffusers import {config}, DiffusionPipeline",
        (backend if "ring_degree" in degrees else "")
        + f"pipe.transformer.enable_parallelism(config={config}({_arguments(degrees)}))",
    )


def _cache_dit(engine: Engine, plan: Launch) -> str:
    """``enable_cache`` with a split and no cache: without ``cache_config`` it only splits."""
    fields: dict[str, object] = dict(plan.degrees(engine))
    if not fields:
        raise Inexpressible("cache-dit on one GPU splits nothing; that is --emit diffusers")
    if plan.spec.degree("ring") > 1:
        fields["ring_rotate_method"] = plan.spec.options.get("rotate", "p2p")
    return _snippet(
        plan,
        "import cache_dit\nimport torch\nfrom diffusers import DiffusionPipeline",
        f"split = cache_dit.ParallelismConfig({_arguments(fields)})\n"
        "cache_dit.enable_cache(pipe, parallelism_config=split)",
    )


# -------------------------------------------------------------------------------------------- engines

SEQUENCE = frozenset({"ulysses", "ring"})
TENSOR = frozenset({"tensor"})
CFG = frozenset({"cfg"})
PIPELINE = frozenset({"pipefusion"})
DATA = frozenset({"data"})

XDIT = Engine(
    degrees={
        "ulysses": "--ulysses_degree",
        "ring": "--ring_degree",
        "pipefusion": "--pipefusion_parallel_degree",
        "cfg": "--use_cfg_parallel",
        "data": "--data_parallel_degree",
        "tensor": "--tensor_parallel_degree",
    },
    models={
        "flux1-dev": Support(SEQUENCE | PIPELINE | DATA, "FLUX.1-dev"),
        "sd3.5-large": Support(SEQUENCE | PIPELINE | CFG | DATA, "SD3.5"),
        "hunyuanvideo": Support(SEQUENCE | DATA, "HunyuanVideo"),
        "wan2.1-14b": Support(SEQUENCE | DATA, "Wan2.1-T2V"),
        "PixArtTransformer2DModel": Support(
            SEQUENCE | PIPELINE | CFG | DATA, "examples/pixartalpha_example.py"
        ),
        "HunyuanDiT2DModel": Support(
            SEQUENCE | PIPELINE | CFG | DATA, "examples/hunyuandit_example.py"
        ),
        "LatteTransformer3DModel": Support(SEQUENCE, "examples/latte_example.py"),
        "CogVideoXTransformer3DModel": Support(SEQUENCE | CFG, "examples/cogvideox_example.py"),
        "sdxl": Support(CFG | DATA, "examples/sdxl_example.py"),
    },
    write=_xdit,
)
"""xfuser 0.7.0: ModelCapabilities in model_executor/models/runner_models, examples/ of the wheel,
options of config/args.py. There is a --tensor_parallel_degree, but no model declares it."""

DIFFUSERS = Engine(
    degrees={"ulysses": "ulysses_degree", "ring": "ring_degree", "tensor": "tp_degree"},
    models={
        "FluxTransformer2DModel": Support(SEQUENCE | TENSOR),
        "WanTransformer3DModel": Support(SEQUENCE),
        "PixArtTransformer2DModel": Support(),
        "SD3Transformer2DModel": Support(),
        "HunyuanDiT2DModel": Support(),
        "HunyuanVideoTransformer3DModel": Support(),
        "LatteTransformer3DModel": Support(),
        "CogVideoXTransformer3DModel": Support(),
        "MochiTransformer3DModel": Support(),
        "UNet2DConditionModel": Support(),
    },
    write=_diffusers,
    rotate=frozenset({"allgather"}),
    apart=(SEQUENCE, TENSOR),
)
"""diffusers 0.42.1: models/_modeling_parallel.py; classes with a ``_cp_plan`` or ``_tp_plan``."""

SGLANG = Engine(
    degrees={
        "ulysses": "--ulysses-degree",
        "ring": "--ring-degree",
        "tensor": "--tp-size",
        "cfg": "--cfg-parallel-size",
    },
    models={
        "FluxTransformer2DModel": Support(SEQUENCE | TENSOR),
        "WanTransformer3DModel": Support(SEQUENCE | CFG),
        "HunyuanVideoTransformer3DModel": Support(frozenset({"ulysses"}), whole_frames=True),
    },
    write=_sglang,
)
"""docs.sglang.io/docs/sglang-diffusion: parallelism, api/cli, compatibility_matrix (read 2026-11-28);
which layers split: sgl-project/sglang, multimodal_gen/runtime/models/dits, flux.py at 00bedbb,
hunyuanvideo.py at 050bbf0, wanvideo.py at 01f06e4. Whole frames: sglang 0.5.23,
configs/pipeline_configs/base.py shard_latents_for_sp, configs/sample/sampling_params.py."""

VLLM_OMNI = Engine(
    degrees={
        "ulysses": "--ulysses-degree",
        "ring": "--ring-degree",
        "tensor": "--tensor-parallel-size",
        "cfg": "--cfg-parallel-size",
    },
    models={
        "FluxTransformer2DModel": Support(TENSOR),
        "SD3Transformer2DModel": Support(TENSOR | CFG),
        "WanTransformer3DModel": Support(SEQUENCE | TENSOR | CFG),
        "sdxl": Support(),
    },
    write=_vllm_omni,
)
"""vllm-project/vllm-omni: vllm_omni/entrypoints/cli/serve.py at 0027c20, docs/models/supported_models.md
at 00218e1, docs/user_guide/diffusion_features.md at 0251fe8."""

CACHE_DIT = Engine(
    degrees={"ulysses": "ulysses_size", "ring": "ring_size", "tensor": "tp_size"},
    models={
        "FluxTransformer2DModel": Support(SEQUENCE | TENSOR),
        "WanTransformer3DModel": Support(SEQUENCE | TENSOR),
        "HunyuanVideoTransformer3DModel": Support(SEQUENCE | TENSOR),
        "PixArtTransformer2DModel": Support(SEQUENCE | TENSOR),
        "CogVideoXTransformer3DModel": Support(SEQUENCE | TENSOR),
        "HunyuanDiT2DModel": Support(TENSOR),
        "MochiTransformer3DModel": Support(TENSOR),
    },
    write=_cache_dit,
    rotate=frozenset({"p2p", "allgather"}),
)
"""cache-dit 1.5.3: distributed/config.py ParallelismConfig, planners of distributed/transformers."""

ENGINES: Mapping[EngineName, Engine] = {
    "xdit": XDIT,
    "diffusers": DIFFUSERS,
    "sglang": SGLANG,
    "vllm-omni": VLLM_OMNI,
    "cache-dit": CACHE_DIT,
}
