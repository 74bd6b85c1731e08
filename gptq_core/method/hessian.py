"""The Hessian of an input group: H = mean over tokens of x xᵀ.

Members of an input group receive the same tensor, so they share one H (in, in), accumulated in float32 over the batches as
they arrive and divided by the token count at the end. H is symmetric: only panels on and below the diagonal are computed,
with plain GEMMs, and mirrored once when the mean is taken. On CUDA, half-precision inputs multiply on the tensor cores with a
float32 result: a bf16 or fp16 product is exact in float32, so nothing is lost against casting first.

On a CPU with AVX-512's instructions for bfloat16 the same is done by a loop in C (kernels/products.c): torch's own product there comes out
rounded to bfloat16, and along a direction in which large channels move together that noise, 2^-9, is as large as the damping. Elsewhere
inputs are cast to float32 first.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_core.kernels import c_loops, dispatch

PANELS = 8
"""Column panels of the half product: narrow ones waste little above the diagonal, wide ones make large GEMMs."""
PANEL_WIDTHS = {"cpu": (c_loops.PANEL, c_loops.PANEL), "cuda": (512, 2048)}
"""The smallest and the largest panel width; on the CPU it is what the loop in C holds at once."""


class Hessian:
    """Running sum of x xᵀ over the tokens seen by one input group; `mean` fills in what lies above the diagonal."""

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
        x = _operand(x, products_dtype(x.dtype, x.device))  # once, not in every panel
        _accumulate([(self._sum[start:, start:stop], x[:, start:], x[:, start:stop]) for start, stop in self._panels], lower=True)

    def mean(self) -> Float[Tensor, "in_features in_features"]:
        """The symmetric mean (in, in), float32. It overwrites the sum, so that nothing can be added afterwards."""
        if self._mean is None:
            self._mean = self._sum.div_(max(self.tokens, 1))
            for start, stop in self._panels:
                self._mean[start:stop, stop:] = self._mean[stop:, start:stop].T
                own = self._mean[start:stop, start:stop]
                own.copy_(own.tril() + own.tril(-1).T)
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
            self._inputs = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
        _add(self._inputs, (original - inputs).reshape(x.shape), x)
        if residual is not None:
            if self._residual is None:
                self._residual = torch.zeros(residual.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            _add(self._residual, residual, x)

    def inputs(self) -> Float[Tensor, "in_features in_features"]:
        """ΔC, float32."""
        assert self._inputs is not None, "no batch was added"
        return self._inputs / self._tokens

    def residual(self) -> Float[Tensor, "hidden in_features"]:
        """ΔR, float32."""
        assert self._residual is not None, "no batch was added with its residual stream"
        return self._residual / self._tokens


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which inputs are multiplied; sums are always in float32."""
    if device.type == "cuda":
        kept = dtype in (torch.bfloat16, torch.float16)
    else:
        kept = device.type == "cpu" and dtype == torch.bfloat16 and dispatch.compiles_products()
    return dtype if kept else torch.float32


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right."""
    dtype = products_dtype(torch.promote_types(left.dtype, right.dtype), right.device)
    _accumulate([(total, _operand(left, dtype), _operand(right, dtype))])


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x.contiguous() if x.is_cpu and dtype == torch.bfloat16 and x.stride(1) != 1 else x


def _accumulate(products: list[c_loops.Product], lower: bool = False) -> None:
    """Add leftᵀ right to the total of each product. Operands are in products_dtype; `lower`: entries above the diagonal may be left out."""
    if products[0][2].is_cpu and products[0][2].dtype == torch.bfloat16:
        c_loops.add_products(products, lower)
        return
    for total, left, right in products:
        if right.dtype == torch.float32:
            total.addmm_(left.T, right)
        else:
            total += torch.mm(left.T, right, out_dtype=torch.float32)
