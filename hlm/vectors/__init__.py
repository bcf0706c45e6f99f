"""The teacher's space: vectors on disk, the ad index over them, and what fits them."""
