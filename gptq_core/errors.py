"""The exceptions users can meet, each message with the value, the rule and the remedy in one line; and the boundary to libraries that
raise others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


class EvaluationError(GPTQError):
    """A model's numbers are none: its losses or its KL are not finite."""


class CorruptCheckpointError(GPTQError):
    """A checkpoint on disk contradicts itself: missing or unexpected tensors, wrong digest, label and zeros that disagree."""


@contextmanager
def foreign_input(what: object, remedy: str, kind: type[GPTQError] = InputError) -> Iterator[None]:
    """While a library reads `what` of the user's: whatever it raises becomes one line with its reason and the remedy.

    The one broad except: parsers end in every kind of exception on input that is damaged or wrong, the tokenizers crate even in bare
    Exception. So as little as possible runs inside, nothing of our own that could hide a bug of ours.
    """
    try:
        yield
    except (GPTQError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        raise kind(f"{what}: {reason(error)}; {remedy}") from error


def reason(error: BaseException, length: int = 300) -> str:
    """An exception in one line: its words, and its type where they alone say little."""
    words = one_line(error, length)
    return words if isinstance(error, (ValueError, OSError)) and words else f"{type(error).__name__}: {words}".removesuffix(": ")


def one_line(text: object, length: int = 300) -> str:
    """A text, such as that of an exception, with single spaces and at most `length` characters."""
    return " ".join(str(text).split())[:length]
