"""The executor against plain loops: pipelines of patches, components in flight, steps in parallel."""

from __future__ import annotations

import plain_loops as plain
import plain_steps
import pytest
import torch
from test_executor_strips import execute, graph_of, latent, reference

from paradiff.executor.interpreter import Unexecutable
from paradiff.models.interception import block_inputs, block_output, block_streams
from paradiff.strategies.asyncdiff import owners_of
from paradiff.strategies.builder import Builder, Mesh, Workload
from paradiff.strategies.pipefusion import patch_rows

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("device"),
]

STEPS = 5
DITS = ("pixart-alpha", "sd3-medium", "flux1-dev", "cogvideox-2b", *plain.OTHERS)
JOINT = [name for name in DITS if name in plain.JOINT]


def blocks(name: str) -> list[str]:
    return [cut.name for cut in plain.twin(name)[0].denoiser.cuts]


def rows_of(name: str, patches: int) -> list[int]:
    """ceil(rows / M) to a multiple of the patch size, the last takes the rest: 16 rows of 2."""
    return {1: [16], 2: [8, 8], 3: [6, 6, 4], 4: [4, 4, 4, 4], 8: [2] * 8}[patches]


# ------------------------------------------------------------------------------------ PipeFusion


@pytest.mark.parametrize("name", DITS)
@pytest.mark.parametrize("spec", ["pipefusion=3,patches=1", "pipefusion=2,patches=4,warmup=5"])
def test_one_patch_or_warmup_alone_is_exact(name: str, spec: str) -> None:
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


@pytest.mark.parametrize("name", [*DITS, "cogvideox-5b"])
@pytest.mark.parametrize(("stages", "patches", "warmup"), [(2, 2, 1), (4, 3, 1), (2, 8, 3)])
def test_patches_in_a_pipeline_equal_the_read_map(
    name: str, stages: int, patches: int, warmup: int
) -> None:
    spec = f"pipefusion={stages},patches={patches},warmup={warmup}"
    if name in plain.JOINT:
        spec += ",text=patch0_frozen"
    fixed = blocks(name) if name in plain.JOINT else []
    rows = rows_of(name, patches)
    expected = plain_steps.pipefusion(name, STEPS, rows, warmup, fixed)
    ours = latent(name, spec)
    assert plain.relative(ours, expected) < 1e-10
    assert plain.relative(ours, reference(name)) > 1e-8


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize(("stages", "counts"), [(2, "1:3"), (3, "1:2:1"), (4, "1:1:1:1")])
def test_text_with_every_patch_equals_the_read_map(name: str, stages: int, counts: str) -> None:
    """Every patch carries its own text through a stage, and begins each with that of patch 0."""
    spec = f"pipefusion={stages},patches=4,stages={counts},text=per_patch"
    starts = [sum(map(int, counts.split(":")[:d])) for d in range(1, stages)]
    fixed = [blocks(name)[i] for i in starts]
    expected = plain_steps.pipefusion(name, STEPS, rows_of(name, 4), 1, fixed)
    assert plain.relative(latent(name, spec), expected) < 1e-10


@pytest.mark.parametrize("name", DITS)
def test_number_of_stages_changes_no_bit(name: str) -> None:
    text = ",text=patch0_frozen" if name in JOINT else ""
    found = [latent(name, f"pipefusion={n},patches=4{text}") for n in (2, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("counts", ["2:4", "1:4:1", "1:1:2:1:1"])
@pytest.mark.parametrize("branches", ["", "cfg=2,"])
def test_skips_across_any_stages_change_nothing(counts: str, branches: str) -> None:
    """HunyuanDiT, blocks 0 to 5 and 1 to 4: local, the hidden state itself, past one stage or three."""
    stages = counts.count(":") + 1
    found = latent("hunyuandit", f"{branches}pipefusion={stages},patches=4,stages={counts}")
    assert plain.relative(found, latent("hunyuandit", "pipefusion=2,patches=4")) < 1e-10


def test_number_of_stages_matters_where_text_goes_with_every_patch() -> None:
    found = [latent("flux1-dev", f"pipefusion={n},patches=4,text=per_patch") for n in (2, 4)]
    assert plain.relative(*found) > 1e-9


@pytest.mark.parametrize("name", DITS)
def test_when_receives_are_posted_changes_no_bit(name: str) -> None:
    found = [latent(name, f"pipefusion=2,patches=4,prepost={when}") for when in ("true", "false")]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["pixart-alpha", "sd3-medium", "cogvideox-2b", "mochi"])
def test_twin_pipelines_for_the_guidance_branches(name: str) -> None:
    together = latent(name, "pipefusion=2,patches=4")
    assert plain.relative(latent(name, "cfg=2,pipefusion=2,patches=4"), together) < 1e-10


def test_patch_rows_are_those_of_the_strategy() -> None:
    profile, _ = plain.twin("sd3-medium")
    build = Builder(profile, Workload(*plain.size_of(profile), STEPS), Mesh(pp=2))
    for patches in (1, 2, 3, 4, 8):
        assert list(patch_rows(build, patches)) == rows_of("sd3-medium", patches)


# ------------------------------------------------------------------------------------- AsyncDiff


def owners(name: str, components: int) -> dict[str, int]:
    """Unit -> component, as the strategy balances them."""
    profile, _ = plain.twin(name)
    build = Builder(profile, Workload(*plain.size_of(profile), STEPS), Mesh())
    found = owners_of(build, components, "balanced")
    return dict(zip(blocks(name), found, strict=True))


@pytest.mark.parametrize("name", plain.NAMES + plain.OTHERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_components_in_flight_equal_the_read_map(name: str, stride: int) -> None:
    table = owners(name, 3)
    spec = f"asyncdiff=3,warmup=1,stride={stride},cuts=balanced"
    expected = plain_steps.asyncdiff(name, STEPS, table, 3, 1, stride)
    ours = latent(name, spec)
    assert plain.relative(ours, expected) < 1e-10
    assert plain.relative(ours, reference(name)) > 1e-8


@pytest.mark.parametrize("name", ["sd21", "sd3-medium"])
@pytest.mark.parametrize("warmup", [2, 3, 4])
def test_last_round_of_stride_two_keeps_its_timestep(name: str, warmup: int) -> None:
    expected = plain_steps.asyncdiff(name, STEPS, owners(name, 2), 2, warmup, 2)
    ours = latent(name, f"asyncdiff=2,warmup={warmup},stride=2,cuts=balanced")
    assert plain.relative(ours, expected) < 1e-10


@pytest.mark.parametrize("name", ["sd21", "svd", "sd3-medium", "cogvideox-2b"])
@pytest.mark.parametrize("rest", ["warmup=1", "warmup=1,stride=2", "warmup=2,stride=2"])
def test_components_of_each_branch_change_nothing(name: str, rest: str) -> None:
    """Ranks of their own for the guidance branches, which exchange predictions before each step."""
    together = latent(name, f"asyncdiff=3,{rest},cuts=balanced")
    assert plain.relative(latent(name, f"cfg=2,asyncdiff=3,{rest},cuts=balanced"), together) < 1e-10


@pytest.mark.parametrize("name", plain.NAMES + plain.OTHERS)
def test_components_that_only_warm_up_are_exact(name: str) -> None:
    assert plain.relative(latent(name, "asyncdiff=2,warmup=5"), reference(name)) < 1e-10


# -------------------------------------------------------------------------------------- ParaStep


@pytest.mark.parametrize("name", [*plain.NAMES, *plain.OTHERS, "sd15"])
@pytest.mark.parametrize(("degree", "warmup"), [(2, 1), (3, 1)])
def test_steps_in_parallel_equal_the_read_map(name: str, degree: int, warmup: int) -> None:
    ours = latent(name, f"parastep={degree},warmup={warmup}")
    expected = plain_steps.parastep(name, STEPS, degree, warmup)
    assert plain.relative(ours, expected) < 1e-10
    assert plain.relative(ours, reference(name)) > 1e-8


@pytest.mark.parametrize("name", plain.NAMES + plain.OTHERS)
@pytest.mark.parametrize("spec", ["parastep=3,warmup=4", "batchstep=2,warmup=4"])
def test_steps_of_which_one_is_left_are_exact(name: str, spec: str) -> None:
    """After a warm-up of T - 1: rank 0 evaluates the only step of the only cycle, at its latent."""
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("sd3-medium", "cfg=2"),
        ("sd3-medium", "cfg=2,ulysses=2"),
        ("pixart-alpha", "ring=2"),
        ("sd21", "patch=2"),
        ("sd21", "cfg=2,patch=2"),
    ],
)
def test_steps_in_parallel_over_any_exact_pass(name: str, inside: str) -> None:
    """Groups that share an exact pass predict what a single rank does."""
    alone = latent(name, "parastep=2,warmup=1")
    assert plain.relative(latent(name, f"parastep=2,{inside},warmup=1"), alone) < 1e-10


@pytest.mark.parametrize("name", plain.NAMES)
@pytest.mark.parametrize("degree", [2, 3])
def test_a_batch_of_steps_equals_steps_in_parallel(name: str, degree: int) -> None:
    """Every bit: entries of the batch are ParaStep's ranks, their schedulers' history included."""
    found = [latent(name, f"{which}={degree},warmup=1") for which in ("parastep", "batchstep")]
    assert torch.equal(*found)


# ------------------------------------------------------------------------------- features reused


def fresh_units(name: str) -> list[str]:
    """A transformer's last block; a U-Net's input, first and last block, and output."""
    parents = list(dict.fromkeys(cut.parent for cut in plain.twin(name)[0].denoiser.cuts))
    if "transformer_blocks" in parents[-1] or "blocks" not in "".join(parents[:1] + parents[-1:]):
        inner = [p for p in parents if p.startswith(("down", "mid", "up"))]
        if inner:
            return [p for p in parents if p not in inner or p in (inner[0], inner[-1])]
    return parents[-1:]


@pytest.mark.parametrize("name", plain.NAMES)
@pytest.mark.parametrize(("spec", "reused"), [("cache=2", (1, 3)), ("skip=2:3", (2, 3))])
def test_reused_features_equal_a_plain_loop(name: str, spec: str, reused: tuple[int, ...]) -> None:
    expected = plain_steps.reusing(name, STEPS, fresh_units(name), reused)
    ours = latent(name, spec)
    assert plain.relative(ours, expected) < 1e-10
    assert plain.relative(ours, reference(name)) > 1e-8


@pytest.mark.parametrize("name", ["sd21", "sd3-medium"])
def test_a_cache_of_no_age_reuses_nothing(name: str) -> None:
    assert torch.equal(latent(name, "cache=1"), latent(name, "serial"))


@pytest.mark.parametrize("inside", ["cfg=2", "ulysses=2", "cfg=2,ring=2"])
def test_reuse_is_the_same_on_several_ranks(inside: str) -> None:
    alone = latent("sd3-medium", "cache=2")
    assert plain.relative(latent("sd3-medium", f"{inside},cache=2"), alone) < 1e-10


@pytest.mark.parametrize("spec", ["cfg=2,ulysses=2", "parastep=2,warmup=1"])
def test_loads_change_no_bit(spec: str) -> None:
    found = [latent("sd3-medium", f"{spec}{more}") for more in ("", ",offload=text+vae")]
    assert torch.equal(*found)


def test_weights_elsewhere_are_refused() -> None:
    with pytest.raises(Unexecutable, match="weights=hsdp cannot be executed yet"):
        latent("sd3-medium", "ulysses=2,weights=hsdp")


# ----------------------------------------------------------------------------------- StreamBatch


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("sd21", "streambatch=2"),
        ("sd21", "cfg=2,streambatch=2,patch=2"),
        ("svd", "streambatch=3"),
        ("flux1-dev", "streambatch=2,ulysses=2"),
        (
            "hunyuandit",
            "streambatch=2",
        ),  # DDPM: the second group adds noise where the first has ended
    ],
)
def test_steps_handed_on_are_exact(name: str, spec: str) -> None:
    assert plain.relative(latent(name, spec), reference(name)) < 1e-10


def test_a_scheduler_with_memory_is_not_handed_on() -> None:
    with pytest.raises(Unexecutable, match="DPMSolverMultistepScheduler remembers earlier steps"):
        latent("pixart-alpha", "streambatch=2")


# ----------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", DITS)
def test_streams_of_a_block_go_in_and_out(name: str) -> None:
    """What is taken from a block's inputs and put in place of its output has the output's shape."""
    run = plain.Plain(name, 2)
    seen: list[bool] = []

    def hook(_: object, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
        image, text = block_streams(run.model, out)
        passed = block_output(run.model, *block_inputs(run.model, args, kwargs))
        again = block_streams(run.model, passed)
        seen.append(image.shape == again[0].shape)
        seen.append(text is None or text.shape == again[1].shape)

    module = run.model.get_submodule(blocks(name)[1])
    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        run.network(run.x, run.scheduler.timesteps[0])
    handle.remove()
    assert seen == [True, True]


def test_graphs_run_as_they_are_written() -> None:
    """A second run of the same graph has nothing left over from the first."""
    graph = graph_of("sd3-medium", "pipefusion=2,patches=4")
    first = execute("sd3-medium", graph).latents[0]
    assert torch.equal(execute("sd3-medium", graph).latents[0], first)
