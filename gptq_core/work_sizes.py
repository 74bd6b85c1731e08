"""How much of the calibration text one forward takes."""

from __future__ import annotations

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}
"""Tokens of one calibration batch: enough to fill the GEMMs, few enough that a batch's activations stay small."""


PROBE_TOKENS = 4096
"""Tokens on which the KL of a unit is measured, at least one window."""


PROBED_WIDTHS = 2
