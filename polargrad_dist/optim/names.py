"""Names of parameters that do not depend on what a model is wrapped in."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# Attributes of torch.compile's and activation checkpointing's wrappers; some of these leave them out of names themselves.
_RESERVED = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and whole-model ``torch.compile``."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """What removes the prefixes of DDP, ``torch.compile`` and activation checkpointing from names in this model.

    ``module`` is also a name that adapters give to the layer they wrap, so it is removed only where a module is DDP's.
    """
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    replicated = {
        ".".join((*_bare(path), "module"))
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, parallel)
    }

    def clean(name: str) -> str:
        parts = _bare(name)
        return ".".join(
            part
            for i, part in enumerate(parts)
            if part != "module" or ".".join(parts[: i + 1]) not in replicated
        )

    return clean


def _bare(path: str) -> list[str]:
    return [part for part in path.split(".") if part and part not in _RESERVED]
