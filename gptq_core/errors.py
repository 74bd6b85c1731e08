"""The exceptions users can meet. Each message gives the value, the rule and the remedy in one line."""


class GPTQError(Exception):
    """Base of everything this library raises on purpose."""


class InputError(GPTQError):
    """The request cannot be carried out as given: a wrong config, model folder, text or output. Nothing was touched."""


class UnsupportedModelError(InputError):
    """The model has parts that this engine cannot quantize yet; the message names them."""


class OutputHeldError(GPTQError):
    """Another run holds the output folder."""


class FactorizationError(GPTQError):
    """A layer's Hessian could not be factored, even with more damping."""


class CorruptCheckpointError(GPTQError):
    """A checkpoint on disk contradicts itself: missing or unexpected tensors, wrong digest, label and zeros that disagree."""
