"""Write `localvit/surgery/supported.json` and `docs/supported-models.md` (`make supported`, some minutes).

Exits 1 if a localized model lost an ability of the plain one.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
import transformers

from localvit.surgery import (
    SupportEntry,
    scan_supported,
    supported_document,
    supported_table,
    timm_architectures,
)
from tests.surgery import cases, test_hf, test_torchvision
from tests.surgery.abilities import ABILITIES, outcome

ROOT = Path(__file__).parents[1]
PAGE = """# Supported models

By class, for timm {timm}: {accepted} of {all} architectures of `timm.list_models()` are accepted.
`make supported` writes this page; `localvit models --supported PATTERN` lists architectures.
Other classes: [adapters](adapters.md).

{classes}
## What a localized model can do

Each row is a small model of `tests/surgery`, tried with {versions}: outputs, and in
training the gradients of two steps, are those of the model itself. **yes**: the localized model can do it.
**no**: neither it nor the plain one can. **lost**: the plain one can. DDP (without a search for unused
parameters) and FSDP2 (`fully_shard`) wrap the model after `localize`. `fuse` gives the same logits, or finds
nothing that it knows (left alone). Selective checkpointing is for `init: paper`, which some FFNs do not
accept.

{abilities}"""


def abilities() -> Iterator[tuple[str, str, list[str]]]:
    """Try all abilities of all cases: class, case, outcomes."""
    libraries = {
        "": cases.CASES,
        "torchvision ": test_torchvision.CASES,
        "transformers ": test_hf.CASES,
        "open_clip ": test_hf.OPEN_CLIP,
    }
    for library, of_library in libraries.items():
        for name, case in of_library.items():
            outcomes = []
            for title, ability in ABILITIES.items():
                model, images = case.make(), case.images()
                if title == "save and open" and case.named:
                    model = timm.create_model(case.named)
                    images = torch.randn(1, *timm.get_pretrained_cfg(case.named).input_size)
                found, reason = outcome(model, images, ability)
                outcomes.append(found)
                if found == "lost":
                    print(f"{library}{name}: {title} is lost: {reason}", file=sys.stderr, flush=True)
            yield type(case.make()).__name__, library + name, outcomes


def page(entries: list[SupportEntry], rows: list[tuple[str, str, list[str]]]) -> str:
    """Return the text of `docs/supported-models.md`."""
    lines = [["class", "model", *ABILITIES], ["---"] * (len(ABILITIES) + 2)]
    lines += [[f"`{kind}`", name, *outcomes] for kind, name, outcomes in rows]
    return PAGE.format(
        timm=timm.__version__,
        versions=", ".join(f"{m.__name__} {m.__version__}" for m in (torch, timm, torchvision, transformers)),
        accepted=sum(entry.accepted for entry in entries),
        all=len(entries),
        classes=supported_document(entries),
        abilities="".join(f"| {' | '.join(line)} |\n" for line in lines),
    )


def main() -> int:
    """Recompute both tables and write both files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = sorted(abilities())
    entries = scan_supported(timm_architectures())
    (ROOT / "localvit/surgery/supported.json").write_text(supported_table(entries))
    (ROOT / "docs/supported-models.md").write_text(page(entries, rows))
    return int(any("lost" in outcomes for _, _, outcomes in rows))


if __name__ == "__main__":
    sys.exit(main())
