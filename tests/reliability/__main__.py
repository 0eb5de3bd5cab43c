"""Campaigns that fork trainers, in a process of their own: `python -m tests.reliability FOLDER KILLS STOPS`."""

import json
import sys
from pathlib import Path

import torch

from tests.reliability import campaigns, harness, ranks

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kills, stops = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole = harness.reference(folder)
    found = {
        "kills": campaigns.kills(folder, whole, kills),
        "terminations": campaigns.terminations(folder, whole, stops),
        "signals": campaigns.signals(folder, whole),
        "elastic": ranks.elastic(folder),
        "memory": campaigns.memory(folder, 2),
        "independence": ranks.independence(folder, "sit", 40, {"2>1": [2, 1]}, warmup_steps=10),
        "stuck": ranks.stuck(folder, 4.0, 0),
    }
    print(json.dumps(found))
