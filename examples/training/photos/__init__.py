"""Data of the photograph model; its trained weights lie here, too."""
