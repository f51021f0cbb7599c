"""Searchers at equal cost: what hypervolume each has reached after how many full-evaluation equivalents."""
