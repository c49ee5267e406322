"""The stored recipes, one TOML file each; `lowbit.recipe` reads them."""
