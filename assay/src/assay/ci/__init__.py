"""assay inside other people's tools: a plugin of pytest, a judge of pull requests."""
