"""The prompts of the sample sheet, which ship with the package."""

BUILT_IN_PROMPTS = (
    "red apple", "pizza", "hamburger", "panda", "butterfly", "rocket", "house", "grinning face",
)  # fmt: skip
"""What the demo shows: some plain, some busy."""
TRAINED_PROMPTS = (
    "red apple", "pizza", "hamburger", "strawberry", "avocado", "doughnut", "cat face", "panda",
    "octopus", "butterfly", "rose", "sunflower", "mushroom", "cactus", "rocket", "airplane",
    "sailboat", "house", "soccer ball", "guitar", "trophy", "grinning face", "ghost", "robot",
    "key", "hammer", "bicycle", "light bulb", "cherries", "crown", "frog", "watermelon",
)  # fmt: skip
HELD_OUT_PROMPTS = (
    "penguin", "bus", "tropical fish", "taco", "broccoli", "volcano", "violin", "flamingo",
)  # fmt: skip
"""Concepts that the training never sees."""
