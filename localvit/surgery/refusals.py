"""Reasons why classes of timm's models are not localized."""


def reason_for(name: str) -> str | None:
    """Return the reason why the class of this full name is refused; `None` if it is not known."""
    return None
