"""The prompts of the sample sheet, which ship with the package."""

BUILT_IN_PROMPTS = (
    "red apple", "frog", "grinning face", "hamburger",
    "panda", "cactus", "taxi", "strawberry", "robot",
)  # fmt: skip
"""What the demo shows: some plain, some busy."""
TRAINED_PROMPTS = (
    "red apple", "pizza", "hamburger", "strawberry", "avocado", "doughnut", "cat face", "panda",
    "octopus", "butterfly", "rose", "sunflower", "mushroom", "cactus", "rocket", "airplane",
    "sailboat", "bicycle", "taxi", "tiger face", "turtle", "grinning face", "ghost", "robot",
    "banana", "lemon", "carrot", "birthday cake", "cherries", "elephant", "frog", "watermelon",
)  # fmt: skip
HELD_OUT_PROMPTS = (
    "penguin", "bus", "tropical fish", "taco", "broccoli", "hedgehog", "lollipop", "flamingo",
)  # fmt: skip
"""Concepts that the training never sees."""
