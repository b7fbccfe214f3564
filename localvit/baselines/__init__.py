"""Plain transformers of the paper that timm lacks. Importing a module registers its names with timm."""
