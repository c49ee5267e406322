"""Methods of the literature as data: what a recipe is, and one TOML file for each."""
