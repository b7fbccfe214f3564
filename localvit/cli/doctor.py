"""`localvit doctor`: what a bug report needs to say about the machine and the installation."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from localvit.cli.arguments import one_line_errors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print versions, processor, compiler, native kernels, cache folder, GPU and extras, for a bug report.

    Native kernels that are not in use are printed with the reason. Missing ones are compiled.

    Example: localvit doctor --json
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """print JSON"""


def run(options: Options) -> int:
    """Print the facts; return 0."""
    with one_line_errors():
        from localvit.bench import diagnose
        from localvit.structure import to_json

        facts = diagnose()
    if options.json:
        print(to_json(facts), end="")
        return 0
    width = max(len(name) for section in facts.values() for name in section)
    for title, section in facts.items():
        print(title)
        for name, value in section.items():
            print(f"  {name:<{width}}  {value}")
    return 0
