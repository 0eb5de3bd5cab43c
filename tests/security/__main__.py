"""Campaigns that fork, in a process of their own: `python -m tests.security FOLDER`."""

import json
import sys
from pathlib import Path

from tests.security import campaigns

if __name__ == "__main__":
    folder, found = Path(sys.argv[1]), {}
    for name in ("pickles", "safetensors", "configs"):
        (folder / name).mkdir()
        found[name] = getattr(campaigns, name)(folder / name)
    print(json.dumps({**found, "bombs": campaigns.bombs(), "formats": campaigns.formats()}))
