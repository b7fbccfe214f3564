"""Ghostscript, which Pillow starts for PostScript images. Imports no torch, because every verb calls it."""

from PIL import EpsImagePlugin


def disable_ghostscript() -> None:
    """Keep Pillow from starting Ghostscript in this process.

    `FORMATS` restricts the images that this package opens. Data sets of torchvision and of the Hugging Face
    hub open images themselves, in every format that Pillow has.
    """
    EpsImagePlugin.gs_binary = False
