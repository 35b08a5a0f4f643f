"""How well a variational autoencoder does: as a density, as a code, as a picture."""
