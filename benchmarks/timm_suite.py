"""Run timm's own `tests/test_models.py` on every name of ours, and list the outcomes.

The file is not part of this repository: take it from timm's at the installed version's tag.

    make timm-suite TIMM_TESTS=path/to/test_models.py

Two of its lists are extended before it is run, as a contributor to timm would: the patterns of models that
are "non-standard" (those whose tokens have a prefix that the head reads), and the modules whose models have
``forward_intermediates``. Its expectations are untouched.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

import localvit  # noqa: F401 (registers the names)

# Modules of the registry (the last part of a module's path) that are ours.
MODULES = ("variants", "pvt", "t2t_vit", "tnt_legacy")
# Hierarchical without a class token: these pass the strict form of the tests.
STANDARD = "localvit_swin_*"


def patched(source: str, names: list[str]) -> str:
    """timm's test file with our names in its two lists."""
    pyramids = set(timm.list_models(STANDARD))
    non_standard = ", ".join(repr(name) for name in names if name not in pyramids)
    modules = ", ".join(map(repr, MODULES))
    for title, entries in (("NON_STD_FILTERS", non_standard), ("FEAT_INTER_FILTERS", modules)):
        source, count = re.subn(rf"^{title} = \[", f"{title} = [{entries}, ", source, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"timm_suite: no list {title} in the file; is it timm's tests/test_models.py?")
    return "import localvit\n" + source


# Leaves the tests of our names only: -k would match parts of other names.
CONFTEST = """
def name_of(item):
    params = item.callspec.params if hasattr(item, "callspec") else {{}}
    return params.get("model_name", "").partition(".")[0]

def pytest_collection_modifyitems(config, items):
    names = set({names!r})
    ours = [item for item in items if name_of(item) in names]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(ours)])
    items[:] = ours
"""


def run(source: str, names: list[str], workers: int) -> dict[str, dict[str, str]]:
    """Test -> name -> outcome."""
    outcomes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        test, report = Path(folder, "test_models.py"), Path(folder, "report.xml")
        test.write_text(source)
        Path(folder, "conftest.py").write_text(CONFTEST.format(names=names))
        command = [sys.executable, "-m", "pytest", str(test), "-q", f"--junitxml={report}", "--tb=line"]
        command += ["-p", "no:cacheprovider", "-W", "ignore", *(["-n", str(workers)] if workers else [])]
        subprocess.run(command, cwd=folder)
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            test_name, _, rest = case.attrib["name"].partition("[")
            model = rest.rstrip("]").partition("-")[2].partition(".")[0]  # [batch-name.tag]
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[test_name][model] = kinds[0] if kinds else "passed"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="timm's tests/test_models.py")
    parser.add_argument("--names", nargs="*", help="only these; default: every name of ours")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the list as Markdown")
    options = parser.parse_args()
    ours = sorted({name for module in MODULES for name in timm.list_models(module=module)} - {"localized"})
    names = options.names or ours
    source = patched(options.file.read_text(), names)
    outcomes = run(source, names, options.workers)
    head = [f"timm {timm.__version__}, {len(names)} names", "", "| test | passed | failed | skipped |"]
    lines = [*head, "|---|---:|---:|---:|"]
    for test, by_name in sorted(outcomes.items()):
        counts = collections.Counter(by_name.values())
        failed = counts["failure"] + counts["error"]
        lines.append(f"| `{test}` | {counts['passed']} | {failed} | {counts['skipped']} |")
    for test, by_name in sorted(outcomes.items()):
        failed_names = [name for name, outcome in by_name.items() if outcome in ("failure", "error")]
        if failed_names:
            lines.append(f"\n`{test}` failed on: {', '.join(f'`{name}`' for name in sorted(failed_names))}")
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
