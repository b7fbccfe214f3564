"""The largest difference of the logits from the authors' code, for each of its 38 models.

    python -m tests.golden.summary

The tests assert 1e-10; this prints what the differences are.
"""

import timm
import torch

import localvit
from localvit.cost import count_macs, count_parameters
from tests import golden
from tests.baselines import test_pvt, test_t2t_vit
from tests.models import test_golden

# Reference -> timm's name and constructor arguments.
MODELS = {
    **{reference: (name, {}) for reference, name in test_golden.NAMES.items()},
    **test_golden.BY_ARGUMENTS,
    **{name: (name, {}) for name in test_pvt.DEPTHS},
    "pvt_huge_v2": ("pvt_tiny", test_pvt.HUGE),
    **test_t2t_vit.REFERENCES,
}


def main() -> None:
    print("| reference | here | largest difference of logits | parameters | GMACs |")
    print("|---|---|---:|---:|---:|")
    for reference, (name, args) in MODELS.items():
        facts, want = golden.facts(reference), golden.arrays(reference)
        weights, size = golden.filled(facts["state_dict"]), facts["image_size"]
        model = localvit.load_official(weights, timm.create_model(name, **args))
        with torch.no_grad():
            logits = model(torch.from_numpy(golden.make_input(size=size))[:1]).numpy()
        heads = [want[key] for key in ("logits_cls", "logits_dist") if key in want]
        expected = sum(heads) / 2 if heads else want["logits"]
        difference = abs(logits - expected[:1]).max()
        macs = count_macs(model, (3, size, size)) / 1e9
        print(
            f"| `{reference}` | `{name}`{' by arguments' if args else ''} | {difference:.1e} "
            f"| {count_parameters(model):,} | {macs:.4f} |",
            flush=True,
        )
    print(f"\n{len(MODELS)} models")


if __name__ == "__main__":
    main()
