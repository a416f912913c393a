"""What takes long to import: once, in the server that `ranks.py` has its processes forked from."""

import importlib

from utils.runtime import quiet_libraries

quiet_libraries()
for module in ("torch.distributed.fsdp", "utils.training.preparation", "utils.training.finishing"):
    importlib.import_module(module)
