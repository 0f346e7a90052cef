"""Sources of labelled images, label policies and loaders."""
