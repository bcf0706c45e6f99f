"""The recipe, one script a step; `hlm.recipes` of an installed HLM."""
