"""Image-to-image trainers for modelsoup: data, networks, losses, metrics, and `soup i2i`."""
