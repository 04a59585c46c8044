"""Elementwise passes as one kernel each, by torch.compile, and uncompiled where it finds no compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Backend = str | Callable[..., Any]
log = logging.getLogger(__name__)


class _Uncompiled:
    """Why compiling was given up in this process, if it was."""

    reason = ""


_uncompiled = _Uncompiled()


def run_compiled(
    function: Callable[..., Any], backend: Backend | None, *args: Any, dynamic: bool | None = None
) -> Any:
    """Calls a function of tensors compiled by ``backend`` of torch.compile; as it is where that is None.

    ``dynamic`` is torch.compile's: true for one kernel for all sizes. Without a compiler (Triton's on a GPU, C++ on a CPU) a
    warning is logged once, and everything runs uncompiled from then on.
    """
    if backend is None or _uncompiled.reason:
        return function(*args)
    try:
        return _compiled(function, backend, dynamic)(*args)
    except _no_compiler() as error:
        # Raised before the kernel runs, so what it would overwrite is as it was
        _uncompiled.reason = str(error).splitlines()[0]
        log.warning(
            "torch.compile found no working compiler (%s): loss and optimizer steps run uncompiled, at several times the "
            "memory traffic",
            _uncompiled.reason,
        )
        return function(*args)


@cache
def _compiled(function: Callable[..., Any], backend: Backend, dynamic: bool | None) -> Callable[..., Any]:
    import torch._dynamo

    limits = torch._dynamo.config
    # Kinds of shapes and dtypes; beyond, compiling is an error
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def _no_compiler() -> tuple[type[Exception], ...]:
    """What torch.compile raises without a compiler; imported here, since that takes a second."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    return BackendCompilerFailed, InductorError


def constant_result(function: Function) -> Function:
    """Tells the compiler that the result is constant: it need not trace the function.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler: two seconds for every command.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
