"""Developer tools: programs of their own, outside the package."""
