"""What every operator of the `cuda` implementation stands on: sources, compiler, cards, launches, barriers, maps."""
