"""What takes long to import: once, in the server that `forked.py` has its processes forked from."""

import gc
import importlib

from utils.runtime import quiet_libraries

quiet_libraries()
for module in ("torch.distributed.fsdp", "utils.training.stages"):
    importlib.import_module(module)
gc.collect()
gc.freeze()  # else the collector of each process would copy all of these pages
