"""Where `gptq_core.data.windows` used to be found; kept for code that imports it from here."""

from gptq_core.data.windows import Windows, calibration_windows, evaluation_windows, split_windows

__all__ = ["Windows", "calibration_windows", "evaluation_windows", "split_windows"]
