"""Run a script as if its processes had GPUs, without which accelerate does not shard.

accelerate launch --config_file hparams/fsdp.yaml tests/fsdp_on_cpu.py train_glue.py ...
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

original = PartialState.__init__


def as_if_on_gpus(self, *args, **options):
    new = not PartialState._shared_state
    original(self, *args, **options)
    if new:
        self.distributed_type = DistributedType.MULTI_XPU


PartialState.__init__ = as_if_on_gpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
