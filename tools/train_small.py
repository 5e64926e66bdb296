"""Trains the small models of ``paradiff.models.small`` on scikit-learn's digits; a few minutes on a CPU.

    OMP_NUM_THREADS=1 python tools/train_small.py small-dit --work /tmp/train --seconds 150

Goes on where it was stopped (``--work``), so a run may be cut into pieces: what is drawn in a step
depends on the seed and the step alone. When all steps are done the averaged weights and the log lie in
the folder of the package (``--output``).

The 1797 pictures of 8 x 8 pixels (UCI ML hand-written digits, as scikit-learn ships them) are enlarged
to 32 x 32 by cubic interpolation. The network predicts v (Salimans and Ho 2022) under the betas of
Stable Diffusion; one text in ten is left empty, for guidance.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from paradiff.models.small import (
    BASES,
    NO_DIGIT,
    SIDE,
    WEIGHTS,
    new_model,
    small_scheduler,
    words,
)

STEPS = {"small-dit": 1050, "small-unet": 500}
"""Some two minutes of one core each."""
HORIZON = {"small-dit": 2400, "small-unet": 1200}
"""Steps over which the learning rate would fall to nothing; the average makes up for the rest."""
RATE, BATCH, WARM, KEEP, EMPTY = 1.5e-3, 16, 200, 0.998, 0.1
"""Learning rate; pictures a step; steps until the full rate; weight of the past in the average; share
of the texts that are left empty."""


def pictures() -> tuple[Tensor, Tensor]:
    """All pictures (n, 1, SIDE, SIDE) in -1 to 1, and their digits (n,)."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)
    return large, torch.tensor(data.target)


class Training:
    """Model, average and optimizer of one run, and where it stands."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.seed, self.done, self.seconds, self.log = name, seed, 0, 0.0, []
        self.model = new_model(name).train()
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)
        self.scheduler = small_scheduler(name)
        self.images, self.digits = pictures()
        self.texts = words([*range(NO_DIGIT), None])

    def loss(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.images), (BATCH,), generator=draw)
        x = self.images[chosen]
        noise = torch.randn(x.shape, generator=draw)
        t = torch.randint(1000, (BATCH,), generator=draw)
        empty = torch.rand(BATCH, generator=draw) < EMPTY
        text = self.texts[torch.where(empty, NO_DIGIT, self.digits[chosen])]
        mean = self.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1).sqrt()
        spread = (1 - mean**2).sqrt()
        noisy, v = mean * x + spread * noise, mean * noise - spread * x
        return F.mse_loss(predict(self.model, noisy, t, text), v)

    def step(self) -> float:
        total, done = HORIZON[self.name], self.done
        rate = min(1.0, (done + 1) / WARM) * (0.02 + 0.98 * (1 - done / total))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * RATE
        loss = self.loss(done)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        keep = min(KEEP, (1 + done) / (10 + done))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)
        self.done += 1
        return loss.item()

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "log": self.log,
        }

    def restore(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.done = state["average"], state["done"]
        self.seconds, self.log = state["seconds"], state["log"]


def predict(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network called as the executor calls it."""
    if type(model).__name__ == "PixArtTransformer2DModel":
        return model(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
    return model(x, t, encoder_hidden_states=text, return_dict=False)[0]


def run(training: Training, seconds: float) -> None:
    """Train until all steps are done, or for so many ``seconds`` of the clock on the wall."""
    end, began, losses = time.monotonic() + seconds, time.process_time(), []
    before = training.seconds
    total = STEPS[training.name]
    while training.done < total:
        losses.append(training.step())
        training.seconds = before + time.process_time() - began
        if training.done % 250 == 0 or training.done == total:
            mean = sum(losses) / len(losses)
            line = f"step {training.done} loss {mean:.4f} {training.seconds:.0f} CPU s"
            training.log.append(line)
            losses = []
            print(line, flush=True)
        if time.monotonic() > end:
            return


def finish(training: Training, output: Path) -> None:
    """Weights and log into the package."""
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": training.name,
        "seed": training.seed,
        "steps": STEPS[training.name],
        "batch": BATCH,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    tensors = {name: value.contiguous() for name, value in training.average.items()}
    metadata = {name: str(value) for name, value in facts.items()}
    save_file(tensors, output / f"{training.name}.safetensors", metadata=metadata)
    lines = [json.dumps(facts), *training.log, f"took {training.seconds:.0f} CPU s"]
    (output / f"{training.name}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(BASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--work", type=Path, required=True, help="where a stopped run is kept")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    training = Training(given.model, given.seed)
    kept = given.work / f"{given.model}-{given.seed}.pt"
    if kept.exists():
        training.restore(torch.load(kept, weights_only=True))
    run(training, given.seconds)
    given.work.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".part")
    torch.save(training.state(), partial)
    partial.replace(kept)
    if training.done == STEPS[given.model]:
        finish(training, given.output)
        print(f"written to {given.output}")


if __name__ == "__main__":
    main()
