"""Images in folders, one folder per class.

timm's sort key is equal for some names, so its order of such classes and files differs between processes (see
`name_order`).
"""

from __future__ import annotations

import os

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder

from localvit.data.config import DataError
from localvit.data.images import ReaderImages
from localvit.data.order import name_order


class FolderReader(ReaderImageFolder):
    """Folder reader of timm, with an order of classes and files that depends on their names alone.

    Args:
        root: The folder, searched to any depth. The class of an image is the name of the folder it is in.

    Raises:
        DataError: if there are no images.
    """

    def __init__(self, root: str) -> None:
        Reader.__init__(self)
        self.root = root
        extensions = get_img_extensions(as_set=True)
        files = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in extensions
        ]
        if not files:
            accepted = ", ".join(get_img_extensions())
            raise DataError(f"{root!r}: 0 images in its folders; accepted files: {accepted}")
        files.sort(key=name_order)
        labels = [os.path.basename(os.path.relpath(os.path.dirname(file), root)) for file in files]
        labels = ["" if label == "." else label for label in labels]
        names = sorted(set(labels), key=name_order)
        self.class_to_idx = {name: index for index, name in enumerate(names)}
        self.samples = [(file, self.class_to_idx[label]) for file, label in zip(files, labels, strict=True)]


def open_folder(folder: str) -> ReaderImages:
    """Open the images of a folder.

    Raises:
        DataError: if there are no images.
    """
    reader = FolderReader(folder)
    return ReaderImages(reader, list(reader.class_to_idx), [label for _, label in reader.samples])
