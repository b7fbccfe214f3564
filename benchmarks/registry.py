"""Write `localvit/models/cards.jsonl` (`python -m benchmarks.registry`, half a minute)."""

from pathlib import Path

from localvit.models import count, names
from localvit.structure import to_json

if __name__ == "__main__":
    lines = [to_json(count(name), indent=None) + "\n" for name in names()]
    (Path(__file__).parents[1] / "localvit/models/cards.jsonl").write_text("".join(lines))
