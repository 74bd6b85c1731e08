"""The Hessian of an input group: H = mean over tokens of x xᵀ.

Members of an input group receive the same tensor, so they share one H (in, in), accumulated in float32 over the batches as
they arrive and divided by the token count at the end. H is symmetric: only panels on and below the diagonal are computed,
with plain GEMMs, and mirrored once when the mean is taken. On CUDA, half-precision inputs multiply on the tensor cores with a
float32 result: a bf16 or fp16 product is exact in float32, so nothing is lost against casting first.

On a CPU with instructions for bfloat16 the sums are float32 ones too, but come out rounded to bfloat16: along a direction in which large
channels move together that noise, 2^-9, is as large as the damping. So what was rounded off is computed by a second product,

    P = bf16(XᵀX),  Q = bf16(XᵀX - P),  XᵀX ≈ P + Q in float32 to 2^-17 of sqrt(H_ii H_jj),

where torch's addmm subtracts P in float32 before it rounds. Two such products of many tokens cost a little less than a float32 one where
the instructions double its rate, and no float32 copy of the inputs. Elsewhere inputs are cast first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_core.processor import multiplies_in_bfloat16

PANELS = 8
"""Column panels of the half product: narrow ones waste little above the diagonal, wide ones make large GEMMs."""
PANEL_WIDTHS = {"cpu": (128, 256), "cuda": (512, 2048)}
"""The narrowest and the widest."""
TOKENS_FOR_TWO_PRODUCTS = 2048
"""At least: of fewer, adding the products up takes longer than multiplying in bfloat16 saves."""


class Hessian:
    """Running sum of x xᵀ over the tokens seen by one input group."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._panels = panels(in_features, self._sum.device)
        self._mean: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Float[Tensor, "*batch in_features"]) -> None:
        """Add a batch of inputs; every leading axis counts as tokens."""
        assert self._mean is None, "the mean was taken already"
        x = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += x.shape[0]
        if not _on_tensor_cores(x):
            # once, not in every panel: oneDNN reads rows of a left operand as they are, and lays out columns anew each time
            x = x.T.contiguous().T if in_two_products(len(x), x.dtype, x.device) else x.float()
        for start, stop in self._panels:
            below, panel = x[:, start:].T, x[:, start:stop]
            target = self._sum[start:, start:stop]
            _accumulate(target, below, panel)

    def mean(self) -> Float[Tensor, "in_features in_features"]:
        """The symmetric mean (in, in), float32. It takes the place of the sum, to which nothing can be added any more."""
        if self._mean is None:
            self._mean = self._sum.div_(max(self.tokens, 1))
            for start, stop in self._panels:
                self._mean[start:stop, stop:] = self._mean[stop:, start:stop].T
        return self._mean


def panels(in_features: int, device: torch.device) -> list[tuple[int, int]]:
    """The column panels of a Hessian, first column and the one after the last."""
    narrowest, widest = PANEL_WIDTHS.get(device.type, PANEL_WIDTHS["cuda"])
    width = min(widest, max(narrowest, in_features // PANELS))
    return [(start, min(start + width, in_features)) for start in range(0, in_features, width)]


class Shift:
    """What the quantized layers before an input group have changed, as seen from its inputs x̃: running sums over the tokens.

    ΔC = mean (x - x̃) x̃ᵀ with x the inputs in the original model, and where a member writes to the residual stream, ΔR = mean
    (r - r̃) x̃ᵀ with r that stream before the member's output is added.
    """

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._residual: Tensor | None = None
        self._tokens = 0

    def add(
        self,
        inputs: Float[Tensor, "*batch in_features"],
        original: Float[Tensor, "*batch in_features"],
        residual: Float[Tensor, "tokens hidden"] | None,
    ) -> None:
        """Add a batch: its inputs now, the same tokens in the original model, and r - r̃."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self._tokens += x.shape[0]
        if self._inputs is None:
            self._inputs = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        _accumulate(self._inputs, (original - inputs).reshape(x.shape).T, x)
        if residual is not None:
            if self._residual is None:
                self._residual = torch.zeros(residual.shape[1], x.shape[1], device=x.device)
            _accumulate(self._residual, residual.T, x)

    def inputs(self) -> Float[Tensor, "in_features in_features"]:
        """ΔC, float32."""
        return self._inputs / self._tokens

    def residual(self) -> Float[Tensor, "hidden in_features"] | None:
        """ΔR, float32; None where no residual stream was told."""
        return None if self._residual is None else self._residual / self._tokens


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def in_two_products(tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a batch is multiplied in bfloat16 and what was rounded off with it; see the top."""
    return device.type == "cpu" and dtype == torch.bfloat16 and tokens >= TOKENS_FOR_TWO_PRODUCTS and multiplies_in_bfloat16()


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, in float32 or near it."""
    if _on_tensor_cores(right):
        total += torch.mm(left, right, out_dtype=torch.float32)
    elif left.dtype == right.dtype and in_two_products(len(right), right.dtype, right.device):
        _add_in_two_products(total, left.contiguous(), right)
    else:
        total.addmm_(left.float(), right.float())


def _add_in_two_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, a panel of its columns at a time."""
    width = PANEL_WIDTHS["cpu"][1]
    for part, columns in zip(total.split(width, dim=1), right.split(width, dim=1), strict=True):
        product = left @ columns
        part += product
        part += product.addmm_(left, columns, beta=-1)  # what was rounded off
