"""A package, so that a dependency that installs one of the same name (torch-fidelity) does not stand in for it."""
