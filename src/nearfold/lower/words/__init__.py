"""The library's words, each with all that it means as tensors. A file that is put here is found; nothing lists them."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
