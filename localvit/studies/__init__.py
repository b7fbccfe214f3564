"""Controlled comparisons: a study as a value, its runs, and what they show. Needs the extra `study`."""
