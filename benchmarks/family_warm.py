"""Imported by the process that families are forked from: one family is checked here, so that each of them finds torch's compiler loaded.

Dynamo loads much when it traces for the first time, which takes longer than most families do afterwards.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings

import torch
import transformers
from family_check import check

warnings.simplefilter("ignore")
transformers.logging.set_verbosity(logging.CRITICAL)
torch.set_num_threads(1)
if os.environ.get("CUDA_VISIBLE_DEVICES") is None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # families are checked on the CPU
check("llama", lambda row: None)
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
gc.collect()
gc.freeze()  # what is loaded is not gone through, and so not copied, by each process
