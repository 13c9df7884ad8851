"""Other implementations of a family's model than transformers': one file each, named for the code that is followed."""
