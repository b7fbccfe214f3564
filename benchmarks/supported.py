"""Write `localvit/surgery/supported.json` and `docs/supported-models.md` (`make supported`, some minutes)."""

from pathlib import Path

import timm

from localvit.surgery import scan_supported, supported_document, supported_table, timm_architectures

ROOT = Path(__file__).parents[1]
HEAD = """# Supported models

By class, for timm {version}: {accepted} of {all} architectures of `timm.list_models()` are accepted.
`make supported` writes this page; `localvit models --supported PATTERN` lists architectures.
Other classes: [adapters](adapters.md).

"""


def main() -> None:
    """Recompute the table and write both files."""
    entries = scan_supported(timm_architectures())
    (ROOT / "localvit/surgery/supported.json").write_text(supported_table(entries))
    accepted = sum(entry.accepted for entry in entries)
    head = HEAD.format(version=timm.__version__, accepted=accepted, all=len(entries))
    (ROOT / "docs/supported-models.md").write_text(head + supported_document(entries))


if __name__ == "__main__":
    main()
