"""One compute thread a test process: its tensors are tiny, and tests run in one process a core.

Two threads that compute a tensor together wait for each other, and on a busy machine such a wait
lasts until the other one has its turn. Set here because the libraries read it when they are loaded,
and through the environment because programs that tests start compute as well.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
