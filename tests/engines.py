"""How other engines read what is printed for them: their own parsers, run without the engines.

Of an unpacked wheel (``make engines``) only the files that read arguments are run. Its other modules,
and the packages that those files import and do not use here, are empty stand-ins; so nothing is
imported that needs a GPU, and no installed version changes. ``python tests/engines.py ENGINE`` takes
lines (lists of words, for cache-dit fields) as JSON and answers with what each was read as, or why it
is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

WHEELS = Path(sys.prefix) / "engines"
Read = dict[str, Any]
"""What a line says: gpus, the degree of each axis that is split, sizes, steps and the like."""


class StandIn(type):
    """A class that has any attribute and can be called, subscripted, decorated with and derived from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "empty" not in vars(cls):
            return super().__call__(*args, **kwargs)
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else stand_in("made")

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def stand_in(name: str) -> Any:
    return StandIn(name, (), {"empty": True})


class Hollow(MetaPathFinder, Loader):
    """Runs the modules ``run`` of one package; the rest of it and the packages ``absent`` are empty.
    ``given``: what an empty module has all the same."""

    def __init__(
        self, run: Sequence[str], absent: Sequence[str], given: Mapping[str, Mapping[str, Any]] = {}
    ) -> None:
        self.package = run[0].split(".")[0]
        self.run, self.absent, self.given = frozenset(run), frozenset(absent), given

    def file(self, name: str) -> Path | None:
        """Source of a module that is to be run."""
        path = WHEELS.joinpath(*name.split("."))
        files = (path / "__init__.py", path.with_suffix(".py"))
        return next((f for f in files if name in self.run and f.exists()), None)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] not in {self.package, *self.absent}:
            return None
        file = self.file(name)
        if file is None:
            return ModuleSpec(name, self, is_package=True)
        inside = [str(file.parent)] if file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = Empty(spec.name)
        module.finder = self
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


class Empty(ModuleType):
    """A module that has any attribute; those that are modules to be run, really."""

    finder: Hollow

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inside = f"{self.__name__}.{name}"
        value = importlib.import_module(inside) if self.finder.file(inside) else stand_in(name)
        setattr(self, name, value)
        return value


def split(**degrees: int | None) -> Read:
    """The axes that are split."""
    return {axis: degree for axis, degree in degrees.items() if degree not in (None, 1)}


def xdit() -> Callable[[Any], Read]:
    """xfuser 0.7.0: the parser of ``xdit`` and that of the example scripts, then its EngineConfig.
    Under torchrun the number of processes is that of the line, under ``xdit`` what it takes from the
    degrees."""
    run = ["args", "config", "gemm"]
    modules = ["xfuser.cli", "xfuser.compat", "xfuser.config", "xfuser.logger"]
    sys.meta_path.insert(0, Hollow([*modules, *(f"xfuser.config.{n}" for n in run)], ["torch"]))
    args = importlib.import_module("xfuser.config.args")
    cli = importlib.import_module("xfuser.cli")

    def read(words: list[str]) -> Read:
        parser = args.FlexibleArgumentParser()
        if words[0] == "xdit":
            parsed = args.xFuserArgs.add_runner_args(parser).parse_args(words[1:])
            engine = args.xFuserArgs.from_runner_args(vars(parsed))
            gpus = cli.get_nproc_from_args(words[1:])
        else:
            options = next(i for i, word in enumerate(words) if word.endswith(".py")) + 1
            parsed = args.xFuserArgs.add_cli_args(parser).parse_args(words[options:])
            engine = args.xFuserArgs.from_cli_args(parsed)
            gpus = int(words[1].removeprefix("--nproc_per_node="))
        engine.use_ray, engine.ray_world_size = True, gpus  # else it starts torch.distributed
        config, given = engine.create_config()
        parallel = config.parallel_config
        pipe = parallel.pp_config
        return {
            "gpus": parallel.world_size,
            "height": given.height,
            "width": given.width,
            "frames": given.num_frames,
            "steps": given.num_inference_steps,
            "prompts": len(given.prompt),
            "patches": pipe.num_pipeline_patch,
            "warmup": config.runtime_config.warmup_steps,
            "stages": pipe.attn_layer_num_for_pp,
            **split(
                ulysses=parallel.ulysses_degree,
                ring=parallel.ring_degree,
                pipefusion=parallel.pp_degree,
                cfg=parallel.cfg_degree,
                data=parallel.dp_degree,
                tensor=parallel.tp_degree,
            ),
        }

    return read


def sglang() -> Callable[[Any], Read]:
    """sglang 0.5.23: the parser of ``sglang generate``, what its server makes of the degrees, and the
    frames of a clip that it shards by whole latent frames (HunyuanVideo)."""
    root = "sglang.multimodal_gen"
    memory = "runtime.managers.memory_managers"
    run = [
        "configs.attention_roles", "configs.post_training", "configs.sample.sampling_params",
        "configs.task_type", "configs.utils", "runtime.disaggregation.roles",
        "runtime.entrypoints.cli.cli_types", "runtime.entrypoints.cli.generate",
        "runtime.entrypoints.cli.utils", f"{memory}.component_residency",
        f"{memory}.layerwise_offload_components", "runtime.server_args",
        "runtime.server_args.auto_tune", "runtime.server_args.disagg",
        "runtime.server_args.server_args", "runtime.utils.argparse",
    ]  # fmt: skip
    machine = SimpleNamespace(is_cpu=lambda: False)
    given = {f"{root}.runtime.platforms": {"current_platform": machine}}
    hollow = Hollow([f"{root}.{name}" for name in run], ["addict", "yaml"], given)
    sys.meta_path.insert(0, hollow)
    generate = importlib.import_module(f"{root}.runtime.entrypoints.cli.generate")
    sampling = importlib.import_module(f"{root}.configs.sample.sampling_params")
    clip = SimpleNamespace(
        use_temporal_scaling_frames=True,
        arch_config=SimpleNamespace(temporal_compression_ratio=4),
    )

    def read(words: list[str]) -> Read:
        parser = argparse.ArgumentParser()
        generate.add_multimodal_gen_generate_args(parser)
        parsed = parser.parse_args(words[2:])
        server = object.__new__(generate.ServerArgs)
        vars(server).update(vars(parsed), pipeline_config=stand_in("pipeline_config"))
        if parsed.cfg_parallel_degree is None:
            server.enable_cfg_parallel = False  # it asks the model, which is not here
        server._adjust_parallelism()
        server._validate_parallelism()
        asked = generate.SamplingParams.get_cli_args(parsed)
        frames = asked.get("num_frames")
        return {
            "gpus": server.num_gpus,
            "height": asked["height"],
            "width": asked["width"],
            "frames": frames,
            "whole_frames": frames
            and sampling.align_num_frames_for_num_gpus(
                frames, num_gpus=server.num_gpus, vae_config=clip, round_down=False
            ),
            "steps": asked["num_inference_steps"],
            "prompts": 1 if isinstance(asked["prompt"], str) else len(asked["prompt"]),
            **split(
                ulysses=server.ulysses_degree,
                ring=server.ring_degree,
                tensor=server.tp_size,
                cfg=server.cfg_parallel_degree,
            ),
        }

    return read


def vllm_omni() -> Callable[[Any], Read]:
    """vllm-omni 0.30.0: the parser of ``vllm serve --omni`` and its DiffusionParallelConfig. The options
    that are vLLM's own come from its documentation (configuration/engine_args): its wheel is too
    large."""
    from pydantic.dataclasses import dataclass

    def of_vllm(parser: Any) -> Any:
        parser.add_argument("model_tag", nargs="?")
        parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
        return parser

    given = {
        "vllm.config.utils": {"config": dataclass},
        "vllm.entrypoints.cli.types": {"CLISubcommand": object},
        "vllm.entrypoints.launchers.cli_args": {"make_arg_parser": of_vllm},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
    }
    run = ["entrypoints.cli.serve", "utils.tracking_parser", "diffusion.data"]
    absent = ["diffusers", "huggingface_hub", "torch", "uvloop", "vllm"]
    sys.meta_path.insert(0, Hollow([f"vllm_omni.{name}" for name in run], absent, given))
    serve = importlib.import_module("vllm_omni.entrypoints.cli.serve")
    parsers = importlib.import_module("vllm_omni.utils.tracking_parser")
    config = importlib.import_module("vllm_omni.diffusion.data").DiffusionParallelConfig

    def read(words: list[str]) -> Read:
        parser = parsers.TrackingArgumentParser()
        commands = parser.add_subparsers(required=True)
        for command in serve.cmd_init():
            command.subparser_init(commands)
        parsed = parser.parse_args(words[1:])
        axes = {
            "ulysses": parsed.ulysses_degree or 1,
            "ring": parsed.ring_degree or 1,
            "tensor": parsed.tensor_parallel_size,
            "cfg": parsed.cfg_parallel_size,
        }
        made = config(
            ulysses_degree=axes["ulysses"],
            ring_degree=axes["ring"],
            tensor_parallel_size=axes["tensor"],
            cfg_parallel_size=axes["cfg"],
        )
        return {"gpus": made.world_size, "omni": parsed.omni, **split(**axes)}

    return read


def cache_dit() -> Callable[[Any], Read]:
    """cache-dit 1.5.3: its ParallelismConfig."""
    run = ["cache_dit.distributed.config", "cache_dit.distributed.backend"]
    sys.meta_path.insert(0, Hollow(run, ["diffusers", "torch"]))
    config = importlib.import_module("cache_dit.distributed.config").ParallelismConfig

    def read(fields: Mapping[str, Any]) -> Read:
        made = config(**fields, use_ray=True)  # else it makes meshes of torch.distributed
        rotate = {"rotate": made.ring_rotate_method} if (made.ring_size or 1) > 1 else {}
        return {
            "gpus": made._get_world_size(),
            **rotate,
            **split(ulysses=made.ulysses_size, ring=made.ring_size, tensor=made.tp_size),
        }

    return read


READERS = {"xdit": xdit, "sglang": sglang, "vllm-omni": vllm_omni, "cache-dit": cache_dit}
PACKAGES = {
    "xdit": "xfuser",
    "sglang": "sglang",
    "vllm-omni": "vllm_omni",
    "cache-dit": "cache_dit",
}


def main(engine: str) -> None:
    lines, answers = json.load(sys.stdin), []
    with contextlib.redirect_stdout(sys.stderr):
        read = READERS[engine]()
        for line in lines:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    answers.append({"read": read(line)})
            except (Exception, SystemExit) as error:
                last = said.getvalue().strip().splitlines()[-1:] or [""]
                answers.append({"refused": f"{type(error).__name__}: {error} {last[0]}"})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
