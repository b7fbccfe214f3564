"""What all fast forms share: they are for inference only."""

from typing import Self

from torch import nn


class InferenceOnly(nn.Module):
    """A module that cannot be trained, because what training needs was folded away."""

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, which it is in already.

        Raises:
            RuntimeError: for training mode.
        """
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is for inference only: train the model it was made from and fuse it "
                "again (localvit.fuse returns a new model and leaves its argument as it was)"
            )
        return super().train(False)
