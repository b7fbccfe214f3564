"""Models in their fast inference form: same logits, other code."""
