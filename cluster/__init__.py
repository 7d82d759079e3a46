"""Ray core, Train, Data and deployment files around the model. Imports `model`, never `serve_app`."""
