"""What is printed for other engines, held against their own parsers, classes and documents."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from shipped import profile
from typer.testing import CliRunner

from analysis.emit import ENGINES, EngineName, Inexpressible, emit, expressible
from paradiff.cli import plan_app
from paradiff.strategies import Workload, parse_spec

DOCUMENTED: dict[str, set[str]] = {
    # xfuser 0.7.0, xfuser/config/args.py: add_runner_args
    "xdit": {
        "--model", "--prompt", "--height", "--width", "--num_frames", "--num_inference_steps",
        "--ulysses_degree", "--ring_degree", "--pipefusion_parallel_degree", "--use_cfg_parallel",
        "--data_parallel_degree",
    },
    # docs.sglang.io/docs/sglang-diffusion: api/cli, parallelism
    "sglang": {
        "--model-path", "--prompt", "--height", "--width", "--num-frames",
        "--num-inference-steps", "--num-gpus", "--ulysses-degree", "--ring-degree", "--tp-size",
        "--cfg-parallel-size",
    },
    # vllm-project/vllm-omni at 0027c20, vllm_omni/entrypoints/cli/serve.py; the tensor one is vLLM's
    "vllm-omni": {
        "--omni", "--ulysses-degree", "--ring-degree", "--cfg-parallel-size",
        "--tensor-parallel-size",
    },
}  # fmt: skip
EXAMPLES = {
    # same file, add_cli_args
    *DOCUMENTED["xdit"], "--num_pipeline_patch", "--warmup_steps", "--attn_layer_num_for_pp",
}  # fmt: skip
FIELDS = {
    # diffusers 0.42.1, models/_modeling_parallel.py
    "ContextParallelConfig": {"ulysses_degree", "ring_degree"},
    "TensorParallelConfig": {"tp_degree"},
    # cache-dit 1.5.3, distributed/config.py
    "ParallelismConfig": {"ulysses_size", "ring_size", "tp_size", "ring_rotate_method"},
}
MODELS = (
    "flux1-dev", "flux1-schnell", "sd3-medium", "sd3.5-large", "pixart-alpha", "hunyuandit",
    "wan2.1-1.3b", "wan2.1-14b", "hunyuanvideo", "cogvideox-2b", "latte", "mochi", "sdxl", "sd15",
)  # fmt: skip


def work(model: str, **changes: Any) -> Workload:
    sizes = {key: profile(model).defaults[key] for key in ("height", "width", "frames", "steps")}
    return Workload(**(sizes | changes))


def written(engine: EngineName, model: str, spec: str, **changes: Any) -> str:
    return emit(engine, parse_spec(spec), profile(model), work(model, **changes))


@cache
def everything(engine: EngineName) -> tuple[tuple[str, str, str], ...]:
    """(model, spec, text) of all that the engine can express on four GPUs."""
    return tuple(
        (model, spec, written(engine, model, spec))
        for model in MODELS
        if ENGINES[engine].support(profile(model))
        for spec in expressible(engine, profile(model), work(model), 4)
    )


def options(text: str) -> dict[str, list[str]]:
    """Options of a command with their values; asserts that nothing else is there."""
    words = shlex.split(re.sub(r"^#.*\n", "", text).replace("\\\n", " "))
    first = next(i for i, word in enumerate(words) if word.startswith("--") and "=" not in word)
    found: dict[str, list[str]] = {}
    for word in words[first:]:
        if word.startswith("--"):
            assert word not in found
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def configs(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The configuration objects that a snippet makes, by name, with their literal fields."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [(getattr(c.func, "id", getattr(c.func, "attr", "")), c) for c in calls]
    return [
        (name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
        for name, call in named
        if name in FIELDS
    ]


@pytest.mark.parametrize("engine", DOCUMENTED)
def test_options_are_documented_and_degrees_make_the_gpus(engine: EngineName) -> None:
    """Closed form: the degrees of the mesh multiply to the GPUs; a bare --use_cfg_parallel is two."""
    assert len(everything(engine)) > 20
    for model, spec, text in everything(engine):
        found = options(text)
        known = EXAMPLES if "examples/" in text else DOCUMENTED[engine]
        assert set(found) <= known, (model, spec, text)
        gpus = 1
        for option in ENGINES[engine].degrees.values():
            if option in found:
                gpus *= int(found[option][0]) if found[option] else 2
        assert gpus == parse_spec(spec).n_gpus, (model, spec, text)


@pytest.mark.parametrize("engine", ["diffusers", "cache-dit"])
def test_snippets_are_python_and_their_fields_documented(engine: EngineName) -> None:
    assert len(everything(engine)) > 20
    for model, spec, text in everything(engine):
        made = configs(text)
        gpus = parse_spec(spec).n_gpus
        assert len(made) == (gpus > 1), (model, spec)
        for name, fields in made:
            assert set(fields) <= FIELDS[name]
            degrees = [value for value in fields.values() if isinstance(value, int)]
            product = 1
            for degree in degrees:
                product *= degree
            assert product == gpus
        compile(text, "<emitted>", "exec")


def test_words_of_each_engine() -> None:
    """One golden line each: pipefusion with uneven stages for xDiT's script, and a server."""
    line = options(
        written("xdit", "pixart-alpha", "cfg=2,pipefusion=4,patches=8,warmup=2,stages=6:7:8:7")
    )
    assert line["--pipefusion_parallel_degree"] == ["4"]
    assert line["--num_pipeline_patch"] == ["8"]
    assert line["--warmup_steps"] == ["2"]
    assert line["--attn_layer_num_for_pp"] == ["6", "7", "8", "7"]
    assert line["--use_cfg_parallel"] == []
    assert written("xdit", "flux1-dev", "ulysses=4,ring=2").startswith(
        "xdit \\\n  --model FLUX.1-dev"
    )
    served = written("vllm-omni", "wan2.1-14b", "cfg=2,tensor=2", batch=2)
    assert served.splitlines()[0].endswith("batch 2")
    assert served.splitlines()[1] == 'vllm serve "$MODEL" \\'


def test_ranks_are_put_on_the_gpus_of_the_plan() -> None:
    spec, p = parse_spec("ulysses=4"), profile("flux1-dev")
    placed = emit("sglang", spec, p, work("flux1-dev"), (0, 2, 1, 3))
    assert placed.startswith("CUDA_VISIBLE_DEVICES=0,2,1,3 sglang generate")
    assert "CUDA_VISIBLE" not in emit("sglang", spec, p, work("flux1-dev"), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("engine", "model", "spec", "reason"),
    [
        ("xdit", "sdxl", "pcpp=2,portion=0.3,slice=sender,warmup=2", "xdit has no pcpp=2"),
        ("xdit", "pixart-alpha", "asyncdiff=2,stride=1,warmup=2", "no asyncdiff=2"),
        ("xdit", "flux1-dev", "tensor=4", "no tensor for flux1-dev"),
        ("xdit", "flux1-dev", "pipefusion=3,patches=6,warmup=1", "cannot set patches=6"),
        ("xdit", "flux1-dev", "pipefusion=3,patches=3,warmup=2", "cannot set warmup=2"),
        ("xdit", "pixart-alpha", "pipefusion=4,patches=4,text=per_patch", "no text=per_patch"),
        ("xdit", "pixart-alpha", "ulysses=8,exchange=4x2", "no exchange=4x2"),
        ("xdit", "pixart-alpha", "ulysses=4,weights=fp8", "weights=fp8 is not carried over"),
        ("diffusers", "flux1-dev", "ring=4", "no rotate=p2p"),
        ("diffusers", "flux1-dev", "tensor=2,ulysses=2", "does not combine ulysses and tensor"),
        ("diffusers", "pixart-alpha", "ulysses=2", "it splits nothing"),
        ("sglang", "hunyuanvideo", "ring=2", "it splits ulysses"),
        ("vllm-omni", "flux1-dev", "ulysses=2", "it splits tensor"),
        ("vllm-omni", "pixart-alpha", "cfg=2", "not known of vllm-omni: pixart-alpha"),
        ("cache-dit", "flux1-dev", "serial", "that is --emit diffusers"),
        ("sglang", "flux1-dev", "ulysses=2,offload=text", "offload=text is not carried over"),
    ],
)
def test_what_an_engine_has_not_is_said(
    engine: EngineName, model: str, spec: str, reason: str
) -> None:
    with pytest.raises(Inexpressible, match=re.escape(reason)):
        written(engine, model, spec)


# ---------------------------------------------------------------------------------- engines installed


def source(package: str, *parts: str) -> ast.Module:
    """A source file of an installed engine, which need not be importable here."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return ast.parse(Path(found.origin).parent.joinpath(*parts).read_text())


def added(tree: ast.AST) -> set[str]:
    """The options that a parser is given in ``tree``."""
    return {
        str(word.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and "add_argument" in (getattr(call.func, "attr", ""), getattr(call.func, "id", ""))
        for word in call.args
        if isinstance(word, ast.Constant)
    }


def test_xdit_parses_every_option() -> None:
    """Options that its two parsers add: the runner's, and that of its example scripts."""
    parsers = {
        node.name: added(node)
        for node in ast.walk(source("xfuser", "config", "args.py"))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("add_")
    }
    assert parsers["add_runner_args"] >= DOCUMENTED["xdit"]
    assert parsers["add_cli_args"] >= EXAMPLES


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("FLUX.1-dev", "flux"),
        ("SD3.5", "stable_diffusion"),
        ("HunyuanVideo", "hunyuan"),
        ("Wan2.1-T2V", "wan"),
    ],
)
def test_xdit_declares_what_its_models_split(name: str, file: str) -> None:
    """ModelCapabilities of the class that is registered under the printed name."""
    (support,) = [s for s in ENGINES["xdit"].models.values() if s.run == name]
    tree = source("xfuser", "model_executor", "models", "runner_models", f"{file}.py")
    (model,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(d, ast.Call) and d.args[0].value == name for d in node.decorator_list)  # type: ignore[attr-defined]
    ]
    declared = [
        {str(k.arg) for k in call.keywords if getattr(k.value, "value", None) is True}
        for call in ast.walk(model)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "ModelCapabilities"
    ][-1]
    for axis, option in ENGINES["xdit"].degrees.items():
        if axis != "data":
            assert (axis in support.axes) == (option.removeprefix("--") in declared), axis


def test_sglang_parses_every_option() -> None:
    """Those of the server, and a sampling option for each field of its SamplingParams."""
    parts = ("multimodal_gen", "configs", "sample", "sampling_params.py")
    (params,) = [
        node
        for node in ast.walk(source("sglang", *parts))
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams"
    ]
    fields = [node.target for node in params.body if isinstance(node, ast.AnnAssign)]
    sampling = {f"--{name.id.replace('_', '-')}" for name in fields if isinstance(name, ast.Name)}
    server = source("sglang", "multimodal_gen", "runtime", "server_args", "server_args.py")
    assert added(server) | sampling >= DOCUMENTED["sglang"]


def test_vllm_omni_parses_every_option_of_its_own() -> None:
    tree = source("vllm_omni", "entrypoints", "cli", "serve.py")
    assert added(tree) >= DOCUMENTED["vllm-omni"] - {"--tensor-parallel-size"}


def test_cache_dit_has_the_fields() -> None:
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    assert set(cache_dit.ParallelismConfig.__dataclass_fields__) >= FIELDS["ParallelismConfig"]


@pytest.mark.torch
def test_diffusers_makes_the_configurations_and_has_the_plans() -> None:
    """Every configuration can be made; a class is said to split just what its plans allow."""
    diffusers = pytest.importorskip("diffusers")
    for _, _, text in everything("diffusers"):
        for name, fields in configs(text):
            getattr(diffusers, name)(**fields)
    for name, support in ENGINES["diffusers"].models.items():
        model = getattr(diffusers, name)
        assert ("ulysses" in support.axes) == (getattr(model, "_cp_plan", None) is not None), name
        assert ("tensor" in support.axes) == (getattr(model, "_tp_plan", None) is not None), name


# -------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(plan_app, ["--topology", "pcie8", "--steps", "6", *arguments])


def test_the_recommended_plan_is_emitted() -> None:
    asked = ["--model", "flux1-dev", "--strategy", "ulysses=2", "--emit", "xdit"]
    done = run(*asked)
    assert done.exit_code == 0, done.stderr
    line = written("xdit", "flux1-dev", "ulysses=2", steps=6)
    assert done.stdout.endswith(f"\nFor xdit:\n\n{line}\n")
    assert json.loads(run(*asked, "--format", "json").stdout)["emit"] == line
    assert "emit" not in json.loads(run(*asked[:4], "--format", "json").stdout)


def test_what_cannot_be_emitted_names_the_best_that_can() -> None:
    """Of diffusers' words for flux1-dev the one named ranks first when all of them are planned."""
    done = run("--model", "flux1-dev", "--strategy", "tensor=2,ulysses=2", "--emit", "diffusers")
    assert done.exit_code == 3
    assert "diffusers does not combine ulysses and tensor" in done.stderr
    named = re.search(r"nearest: --strategy (\S+)$", done.stderr.strip())
    assert named is not None
    specs = expressible("diffusers", profile("flux1-dev"), work("flux1-dev", steps=6), 8)
    all_of_them = [part for spec in specs for part in ("--strategy", spec)]
    ranked = run("--model", "flux1-dev", *all_of_them, "--format", "json")
    assert json.loads(ranked.stdout)["recommended"] == named[1]
    asked = run("--model", "flux1-dev", "--strategy", named[1], "--emit", "diffusers")
    assert asked.exit_code == 0, asked.stderr


def test_machines_are_not_mixed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.emit.expressible", lambda *_: iter(()))
    arguments = ["--topology", "pcie8x2", "--model", "flux1-dev", "--steps", "6"]
    arguments += ["--strategy", "ulysses=2,ring=8", "--emit", "xdit"]
    done = CliRunner().invoke(plan_app, arguments)
    assert done.exit_code == 3
    assert "spans machines" in done.stderr
