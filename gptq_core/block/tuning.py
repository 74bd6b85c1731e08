"""Block tuning: gradient descent on the codes and scales of a solved block, so that its outputs come near those of the original.

The closed form minimises the error of one layer at a time; here the layers of a block are moved together. Each code gets a latent,
a real number that is rounded in the forward while gradients pass straight through. It starts at the minimum of the parabola that
the code itself was chosen on, at most 0.49 from the code, so that the first forward is exactly the closed form. Adam moves latents
and scales for some steps with a rate that falls to 0; zeros stay. The last part of the windows is kept out, and when their error
does not fall the block stays as it was. No other parameter moves: it would not be in the files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from gptq_core.method.solver import Solution
from gptq_core.model.capture import Call

WINDOWS_A_STEP = 4
HELD_OUT = 8
"""One in this many windows judges the tuning instead of driving it."""
LATENT_RATE = 0.002
"""Learning rate of the latents, in steps of the grid. Adam moves each by about that much a step: a larger rate makes codes noisy."""
SCALE_RATE = 0.01
"""Learning rate of the scales, as a share of the mean |scale| of a layer."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Tuning:
    """The result of tuning a block: the mean squared error of its outputs on the windows that were kept out."""

    steps: int
    error_before: float
    error_after: float

    @property
    def kept(self) -> bool:
        return self.error_after < self.error_before


class _Layer:
    """The trainable form of one solution."""

    def __init__(self, solution: Solution, max_code: int) -> None:
        assert solution.latents is not None, "solved without tuning_steps"
        self.solution, self.max_code = solution, max_code
        self.latent = nn.Parameter(solution.latents.clone())
        self.scale = nn.Parameter(solution.scales.float())
        self.zero, self.group = solution.zeros.float(), solution.g_idx.long()

    def weight(self) -> Float[Tensor, "out columns"]:
        inside = self.latent.clamp(0, self.max_code)
        code = inside + (inside.round() - inside).detach()
        return ((code - self.zero[self.group]) * self.scale[self.group]).T

    @torch.no_grad()
    def solved(self) -> Solution:
        scales = self.scale.half()
        usable = torch.isfinite(scales) & (scales != 0)
        codes = self.latent.clamp(0, self.max_code).round().to(torch.uint8)
        return replace(self.solution, codes=codes, scales=torch.where(usable, scales, self.solution.scales), latents=None)


def tune(
    block: nn.Module,
    solutions: dict[str, Solution],
    max_codes: dict[str, int],
    inputs: Float[Tensor, "windows tokens hidden"],
    outputs: Float[Tensor, "windows tokens hidden"],
    call: Call,
    steps: int,
) -> tuple[dict[str, Solution], Tuning]:
    """Solutions of a block's linears, by their names inside it, after `steps` steps; those that came in where nothing was gained.

    inputs: what enters the block behind quantized ones; outputs: what the original block made of the original inputs. `call` is
    the block's call for a batch, whose size says how many windows go through it at once. Two windows are the least.
    """
    held_out = max(1, len(inputs) // HELD_OUT)
    driving = len(inputs) - held_out
    layers = {name: _Layer(solution, max_codes[name]) for name, solution in solutions.items()}
    rates = [{"params": [layer.latent], "lr": LATENT_RATE} for layer in layers.values()]
    rates += [{"params": [layer.scale], "lr": SCALE_RATE * float(layer.scale.detach().abs().mean())} for layer in layers.values()]
    optimizer = torch.optim.Adam(rates, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draws = torch.Generator().manual_seed(0)
    dtype = inputs.dtype

    def error(windows: Tensor, weights: dict[str, Tensor]) -> Tensor:
        part = call.cut(len(windows))
        result = functional_call(block, weights, (inputs[windows], *part.args), part.kwargs)
        found: Tensor = result[0] if isinstance(result, tuple) else result
        return (found.float() - outputs[windows].float()).square().mean()

    def weights() -> dict[str, Tensor]:
        return {f"{name}.weight": layer.weight().to(dtype) for name, layer in layers.items()}

    @torch.no_grad()
    def judge(found: dict[str, Solution]) -> float:
        fixed = {f"{name}.weight": solution.weight(dtype) for name, solution in found.items()}
        parts = torch.arange(driving, len(inputs)).split(call.size)
        return float(sum(error(part, fixed) * len(part) for part in parts)) / held_out

    before = judge(solutions)
    for _ in range(steps):
        optimizer.zero_grad()
        chosen = torch.randperm(driving, generator=draws)[:WINDOWS_A_STEP]
        for part in chosen.split(call.size):
            (error(part, weights()) * len(part) / len(chosen)).backward()
        optimizer.step()
        schedule.step()
    tuned = {name: layer.solved() for name, layer in layers.items()}
    result = Tuning(steps, before, judge(tuned))
    return (tuned if result.kept else solutions), result
