"""Where graphs come from: public datasets, your own files, made-up networks of any size, folders on disk."""
