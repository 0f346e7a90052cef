"""From a config to objects, and the folder of a run."""
