"""From source pictures to a store of tiles: guard, decode, grayscale semantics, breast crop, levels, manifest."""
